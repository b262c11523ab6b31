"""What the bundled model is promised to be."""

import json
import lzma
import re
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
    """Nine words in ten are words of the corpus; random bytes would hardly make one."""
    with lzma.open(SCRIPTS / "data" / "fairytales.txt.xz", "rt", encoding="utf-8") as file:
        known = set(re.findall(r"\w+", file.read().lower()))
    params = SamplingParams(n=4, temperature=0.7, max_tokens=120, seed=0)
    with LLM() as llm:
        tale = llm.generate("Once upon a time", params, use_tqdm=False)[0]
        messages = [{"role": "user", "content": "Tell me a tale."}]
        answer = llm.chat(messages, params, use_tqdm=False)[0]
    for output in (tale, answer):
        text = max((completion.text for completion in output.outputs), key=len)
        words = re.findall(r"\w+", text.lower())
        assert len(words) > 40
        assert sum(word in known for word in words) >= 0.9 * len(words)
        assert "<|im" not in text


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
