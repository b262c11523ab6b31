"""The package's face: lazy exports, version, and what the wheel carries."""

import subprocess
import sys
from importlib import import_module

import pytest

import nanovllm


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it wrote."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_free_of_torch() -> None:
    heavy = run_python(
        "import sys, nanovllm;"
        "nanovllm.SamplingParams, nanovllm.EngineConfig, nanovllm.LLMEngine, nanovllm.Scheduler;"
        "sys.stdout.write(str([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    )
    assert heavy == "[]"


@pytest.mark.parametrize("name", nanovllm.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(nanovllm, name)
    assert name == "__version__" or value.__name__ == name
    assert name in dir(nanovllm)


def test_public_names_and_modules_agree() -> None:
    assert set(nanovllm._MODULE_OF_NAME) == set(nanovllm.__all__) - {"__version__"}
    for name, module in nanovllm._MODULE_OF_NAME.items():
        assert getattr(import_module(module), name) is getattr(nanovllm, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'nanovllm' has no attribute 'Nope'"):
        nanovllm.Nope  # noqa: B018


def test_offline_inference_does_without_the_server_s_packages() -> None:
    """GPU machines are often lent with torch and little else."""
    text = run_python(
        "import sys\n"
        "absent = 'fastapi pydantic zmq msgspec cyclopts llguidance starlette uvicorn'.split()\n"
        "sys.modules.update(dict.fromkeys(absent))\n"  # None there makes an import fail
        "from nanovllm import LLM, SamplingParams\n"
        "with LLM(cpu_threads=1) as llm:\n"
        "    output = llm.generate('Once', SamplingParams(max_tokens=3))[0]\n"
        "sys.stdout.write(str(len(output.outputs[0].token_ids)))"
    )
    assert text == "3"
