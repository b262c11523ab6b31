"""What the rows beside a row change: last bits at most, and with `deterministic` nothing."""

from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams

NUM_OUTPUT = 12
SHARED = torch.randint(4096, (160,), generator=torch.Generator().manual_seed(1)).tolist()


def prompts(count: int) -> list[list[int]]:
    """Prompts of many lengths, every other one with a beginning that others have too."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 120, (count,), generator=generator).tolist()
    own = [torch.randint(4096, (n,), generator=generator).tolist() for n in lengths]
    return [SHARED + ids if row % 2 else ids for row, ids in enumerate(own)]


def scored(llm: LLM, batch: list[list[int]]) -> list[list[float]]:
    """Log probabilities of each prompt's greedy continuation, and the ids as floats before them."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=0)
    rows = []
    for output in llm.generate(batch, params, use_tqdm=False):
        completion = output.outputs[0]
        entries = completion.logprobs or []
        scores = [entry[i].logprob for i, entry in zip(completion.token_ids, entries, strict=True)]
        rows.append([*map(float, completion.token_ids), *scores])
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [{}, {"quantization": "int8"}, {"quantization": "int4"}])
def test_deterministic_rows_are_bitwise_those_of_a_row_alone(
    dtype: str, more: dict[str, Any]
) -> None:
    batch = prompts(64)
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": 320, "deterministic": True} | more
    with LLM(max_num_batched_tokens=2048, **options) as llm:
        together = scored(llm, batch)
    with LLM(max_num_batched_tokens=64, enable_prefix_caching=False, **options) as llm:
        for row in (0, 1, 13, 63):
            assert scored(llm, [batch[row]]) == [together[row]], row


def test_cascade_changes_no_token_in_float32() -> None:
    batch = prompts(32)
    rows = []
    for disabled in (False, True):
        with LLM(dtype="float32", max_model_len=320, disable_cascade_attn=disabled) as llm:
            rows.append([row[:NUM_OUTPUT] for row in scored(llm, batch)])
    assert rows[0] == rows[1]
