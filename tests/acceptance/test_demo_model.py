"""What the bundled model is promised to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from nanovllm import LLM, SamplingParams
from nanovllm.config import DEMO_MODEL

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_it_is_a_small_qwen3_in_the_layout_of_the_hub() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert 4000 <= config["vocab_size"] <= 8192
    weights = DEMO_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert 3e6 <= sum(tensor.numel() for tensor in tensors) <= 6e6
    assert {str(tensor.dtype) for tensor in tensors} == {"torch.bfloat16"}


def test_it_tells_tales_and_answers_a_chat() -> None:
    with LLM() as llm:
        params = SamplingParams(temperature=0, max_tokens=40)
        tale = llm.generate("Once upon a time", params, use_tqdm=False)[0]
        assert " there " in tale.outputs[0].text.lower()
        messages = [{"role": "user", "content": "Tell me a tale."}]
        answer = llm.chat(messages, params, use_tqdm=False)[0]
        assert len(answer.outputs[0].text.split()) > 10
        assert "<|im" not in answer.outputs[0].text


@pytest.mark.slow
def test_it_has_learnt_english_and_not_the_corpus_by_heart() -> None:
    report = json.loads(
        subprocess.run(
            [sys.executable, str(SCRIPTS / "evaluate_demo.py")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert report["held_out_bits_per_byte"] <= 1.45
    assert report["copied_8grams_at_0.7"] <= 0.05
    assert report["copied_8grams_at_1.0"] <= 0.05
