"""bfloat16 against float32, as far as transformers' own bfloat16 is from it."""

import lzma
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM
from nanovllm.bench.quality import hidden_states, log_probs
from nanovllm.config import DEMO_MODEL

CORPUS = Path(__file__).parents[2] / "scripts" / "data" / "fairytales.txt.xz"
WINDOW = 384


@torch.inference_mode()
def test_bfloat16_diverges_no_more_than_that_of_transformers() -> None:
    """Teacher-forced KL divergence to float32, mean over the positions of real text."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        text = file.read()[-20_000:]
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    ours_sum = theirs_sum = 0.0
    with LLM(dtype="bfloat16", max_model_len=WINDOW + 8) as llm:
        ids = llm.encode(text)
        for first in range(0, 4 * WINDOW, WINDOW):
            window = ids[first : first + WINDOW]
            reference, rounded = (
                model(torch.tensor([window])).logits[0].double().log_softmax(-1)
                for model in (exact, theirs)
            )
            found = log_probs(llm, hidden_states(llm, window)).double()
            theirs_sum += float((reference.exp() * (reference - rounded)).sum())
            ours_sum += float((reference.exp() * (reference - found)).sum())
    assert ours_sum <= 1.1 * theirs_sum, (ours_sum, theirs_sum)
