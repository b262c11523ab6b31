"""Which attention backend is taken where, and what the log and the errors say of it."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels import attention_select, flash, flashinfer
from nanovllm.kernels.attention_backend import AttentionConfig
from nanovllm.kernels.attention_select import Registered, default_block_size, select_attention
from nanovllm.kernels.cpu.attention import CpuAttention
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.flash import FlashAttention
from nanovllm.kernels.paired_attention import PairedAttention
from nanovllm.kernels.sdpa import SdpaBackend
from nanovllm.kernels.select import select_kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.attention import TritonAttention
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from tests.attention_packages import stand_in
from tests.triton_device import INTERPRETED

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
CONFIG = AttentionConfig(16, 4, 2, 64, torch.bfloat16)
BACKENDS = ("triton", "flash-attn", "flashinfer", "sdpa")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that makes this machine look like one with some GPU and packages."""

    def become(*packages: str, capability: tuple[int, int] = (9, 0), broken: str = "") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            attention_select, "find_spec", lambda name: name if name in packages else None
        )
        for name in {*flash.PACKAGES.values(), flashinfer.PACKAGE}:
            module: ModuleType | None = stand_in(name) if name in packages else None
            # None in `sys.modules` is an ImportError.
            monkeypatch.setitem(sys.modules, name, None if name == broken else module)

    return become


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that are made, none of which needs its device."""
    names: list[str] = []
    for name, registered in attention_select.REGISTRY.items():

        def make(config: AttentionConfig, device: torch.device, name: str = name) -> Any:
            names.append(name)
            return SdpaBackend(replace(config, backend=name))

        monkeypatch.setitem(attention_select.REGISTRY, name, Registered(registered.problem, make))
    return names


def logged(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = (record.getMessage() for record in caplog.records)
    return line


@pytest.mark.parametrize(
    ("packages", "changes", "line"),
    [
        (("triton",), {}, "triton for prefill and decode (flash-attn is not installed)"),
        (
            ("triton", "flash_attn_interface", "flash_attn"),
            {},
            "flash-attn for prefill, triton for decode (the best there is)",
        ),
        (
            ("triton", "flash_attn", "flashinfer"),
            {},
            "triton for prefill and decode (flash-attn 2 needs a block_size that is a multiple of "
            "256, not 16)",
        ),
        (
            ("triton", "flash_attn"),
            {"block_size": 512},
            "flash-attn for prefill, triton for decode (the best there is)",
        ),
        (
            ("triton", "flash_attn_interface"),
            {"dtype": torch.float32},
            "triton for prefill and decode (flash-attn needs float16 or bfloat16, not float32)",
        ),
        (
            ("triton", "flash_attn_interface"),
            {"deterministic": True},
            "triton for prefill and decode (flash-attn is not deterministic)",
        ),
        (
            ("triton", "flash_attn_interface"),
            {"head_dim": 20},
            "triton for prefill and decode (flash-attn has no kernel for heads of 20)",
        ),
        (
            ("flash_attn_interface",),
            {},
            "flash-attn for prefill and decode (triton is not installed)",
        ),
        (
            (),
            {},
            "sdpa for prefill and decode (flash-attn is not installed; triton is not installed)",
        ),
        (
            ("triton",),
            {"head_dim": 512},
            "sdpa for prefill and decode (flash-attn is not installed; triton takes heads of up to "
            "256, and these have 512)",
        ),
    ],
)
def test_auto_takes_the_best_there_is_and_says_why(
    machine: Machine,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
    packages: tuple[str, ...],
    changes: dict[str, Any],
    line: str,
) -> None:
    machine(*packages)
    with caplog.at_level(logging.INFO):
        backend = select_attention(replace(CONFIG, **changes), CUDA)
    assert logged(caplog) == f"attention: {line}"
    assert isinstance(backend, PairedAttention if "flash-attn for" in line else SdpaBackend)
    assert sorted(made) == sorted(name for name in BACKENDS if f"{name} for" in line)


@pytest.mark.parametrize(
    ("capability", "broken", "version", "problem"),
    [
        ((9, 0), "", 3, ""),
        ((8, 6), "", 2, ""),
        ((10, 0), "", 2, ""),
        ((9, 0), "flash_attn_interface", 2, ""),
        ((7, 5), "", 0, "flash-attn 3 has no kernels for this GPU"),
    ],
)
def test_versions_of_flash_attn(
    machine: Machine, capability: tuple[int, int], broken: str, version: int, problem: str
) -> None:
    machine("flash_attn_interface", "flash_attn", capability=capability, broken=broken)
    assert attention_select.flash_attn_version(CUDA) == (version, problem)


def test_a_package_that_cannot_be_imported_is_none(
    machine: Machine, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    machine("triton", "flash_attn", "flashinfer", broken="flash_attn")
    with caplog.at_level(logging.INFO):
        select_attention(CONFIG, CUDA)
    assert "triton for prefill and decode (flash_attn cannot be imported: " in logged(caplog)


@pytest.mark.parametrize(
    ("packages", "backend", "changes", "problem"),
    [
        ((), "triton", {}, "triton is not installed"),
        (("triton",), "flash-attn", {}, "flash-attn is not installed"),
        (("triton",), "triton,flashinfer", {}, "flashinfer is not installed"),
        (
            ("flashinfer",),
            "flashinfer",
            {"head_dim": 80},
            "flashinfer has no kernel for heads of 80",
        ),
        (
            ("flashinfer",),
            "flashinfer",
            {"dtype": torch.float32},
            "flashinfer needs float16 or bfloat16, not float32",
        ),
        (
            ("flash_attn",),
            "flash-attn",
            {"block_size": 32},
            "flash-attn 2 needs a block_size that is a multiple of 256, not 32",
        ),
        ((), "sdpa", {"deterministic": True}, "sdpa is not deterministic"),
        ((), "cpu", {}, "'cpu' needs a CPU, not cuda"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(
    machine: Machine,
    packages: tuple[str, ...],
    backend: str,
    changes: dict[str, Any],
    problem: str,
) -> None:
    machine(*packages)
    with pytest.raises(InvalidRequestError) as caught:
        select_attention(replace(CONFIG, backend=backend, **changes), CUDA)
    assert str(caught.value) == f"attention_backend={backend!r} cannot be used: {problem}"
    assert caught.value.param == "attention_backend"


@pytest.mark.parametrize("backend", ["flash-attn", "flashinfer", "sdpa,flash-attn", "cpu"])
@pytest.mark.parametrize("device", [CPU, MPS], ids=str)
def test_what_needs_another_device(backend: str, device: torch.device) -> None:
    with pytest.raises(InvalidRequestError, match=f"needs .*{device.type}|needs our CPU kernels"):
        select_attention(replace(CONFIG, backend=backend), device)


def test_pairs(machine: Machine, made: list[str], caplog: pytest.LogCaptureFixture) -> None:
    machine("triton", "flash_attn_interface", "flashinfer")
    with caplog.at_level(logging.INFO):
        select_attention(replace(CONFIG, backend="flash-attn,flashinfer"), CUDA)
    assert logged(caplog) == (
        "attention: flash-attn for prefill, flashinfer for decode (as asked for)"
    )
    assert sorted(made) == ["flash-attn", "flashinfer", "triton"]  # which writes


def test_flash_attn_is_paired_with_itself(machine: Machine) -> None:
    machine("flash_attn_interface")
    backend = select_attention(replace(CONFIG, backend="flash-attn"), CUDA)
    assert isinstance(backend, PairedAttention)
    assert isinstance(backend._prefill, FlashAttention)
    assert backend._prefill is backend._decode is backend._writer


@pytest.mark.parametrize(
    ("packages", "backend", "device", "size"),
    [
        (("flash_attn",), "flash-attn", CUDA, 256),
        (("flash_attn",), "triton,flash-attn", CUDA, 256),
        (("flash_attn", "flash_attn_interface"), "flash-attn", CUDA, 16),
        (("flash_attn",), "auto", CUDA, 16),
        ((), "flash-attn", CUDA, 16),
        (("flash_attn",), "flash-attn", CPU, 16),
    ],
)
def test_default_block_size(
    machine: Machine, packages: tuple[str, ...], backend: str, device: torch.device, size: int
) -> None:
    machine(*packages)
    assert default_block_size(backend, device) == size


def test_kernels_of_a_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "nanovllm.kernels.triton.kernels.TritonKernels", lambda *options: given.append(options)
    )
    machine("triton")
    config = EngineConfig(deterministic=True, quantization="int8")
    select_kernels(config, CUDA, torch.bfloat16)
    assert given == [(CUDA, torch.bfloat16, True)]
    assert "quantized weights are expanded when they are loaded: our GPU kernels" in caplog.text
    caplog.clear()
    machine()
    kernels = select_kernels(EngineConfig(), CUDA, torch.bfloat16)
    assert type(kernels) is TorchKernels
    assert logged(caplog) == (
        "running on torch's operators, several times slower than our Triton kernels: triton is not "
        "installed"
    )
    with pytest.raises(InvalidRequestError, match="CPU or Triton kernels, and triton is not inst"):
        select_kernels(EngineConfig(deterministic=True), CUDA, torch.bfloat16)
    assert type(select_kernels(EngineConfig(), MPS, torch.bfloat16)) is TorchKernels
    with pytest.raises(InvalidRequestError, match="triton does not run on mps"):
        select_kernels(EngineConfig(deterministic=True), MPS, torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "kind"), [("auto", CpuAttention), ("cpu", CpuAttention), ("sdpa", SdpaBackend)]
)
def test_backends_of_a_cpu(backend: str, kind: type) -> None:
    kernels = select_kernels(EngineConfig(attention_backend=backend), CPU, torch.float32)
    assert isinstance(kernels, CpuKernels)
    config = replace(CONFIG, backend=backend, dtype=torch.float32)
    assert type(kernels.attention(config)) is kind


def test_torch_has_no_cpu_backend() -> None:
    kernels = select_kernels(EngineConfig(cpu_isa="torch"), CPU, torch.float32)
    assert type(kernels.attention(CONFIG)) is SdpaBackend
    with pytest.raises(InvalidRequestError, match="'cpu' needs our CPU kernels"):
        kernels.attention(replace(CONFIG, backend="cpu"))


def test_triton_on_a_cpu_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    kernels = select_kernels(EngineConfig(attention_backend="triton"), CPU, torch.float32)
    assert isinstance(kernels, CpuKernels)
    with pytest.raises(InvalidRequestError, match="triton needs a CUDA device; on a CPU it has an"):
        kernels.attention(config)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = select_kernels(EngineConfig(attention_backend="triton"), CPU, torch.float32)
    assert isinstance(kernels, TritonKernels)
    assert isinstance(kernels.attention(config), TritonAttention)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_an_engine_says_the_same_by_any_backend(
    backend: str, checkpoint: Callable[[str], Path]
) -> None:
    if backend == "triton" and not INTERPRETED:
        pytest.skip("compiled kernels do not run on a CPU")

    def tokens(**options: Any) -> list[Any]:
        directory = str(checkpoint("qwen3"))
        with LLM(directory, device="cpu", dtype="float32", num_kv_blocks=32, **options) as llm:
            prompts = [{"prompt_token_ids": [5, 9, 13, 2]}]
            outputs = llm.generate(prompts, SamplingParams(max_tokens=4), use_tqdm=False)
        return [output["token_ids"] for output in outputs]

    assert tokens(attention_backend=backend) == tokens()
