"""What is launched must not wait for the device: no operator whose result the host has to see.

`tests/gpu` sees the same on a GPU, where torch itself tells; here operators are looked at by name.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams
from nanovllm.batch import Batch

WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
"""Operators whose result, or its shape, is copied to the host."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

SMALL: dict[str, Any] = {
    "device": "cpu",
    "cpu_threads": 1,
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "num_kv_blocks": 16,
}
PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=1),
    "scored": SamplingParams(temperature=0, logprobs=3),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.4),
    "biased": SamplingParams(temperature=0, logit_bias={3: 1.0}, min_tokens=2),
}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What waits while steps are launched."""
    runner: Any = llm.engine._runner
    launch, watch = runner.launch, Watch()

    def launch_watched(batch: Batch) -> object:
        with watch:
            return launch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", launch_watched)
        yield watch.waits


def test_waits_are_seen() -> None:
    x = torch.arange(4)
    for wait in (
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x[2].item(),
        lambda: bool(x.any()),
        lambda: x.index_put_((x > 1,), torch.tensor(0)),
        lambda: torch.unique(x),
    ):
        with Watch() as watch:
            wait()
        assert watch.waits
    with Watch() as watch:
        x[torch.tensor([0, 1])] = torch.where(x[:2] > 0, 1, 2)
    assert not watch.waits


@pytest.mark.parametrize("kind", PARAMS)
def test_no_launch_waits(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With our GPU kernels in Triton's interpreter: prompts, chunks, decodes, and all settings."""
    params = PARAMS[kind]
    params.max_tokens, params.ignore_eos = 3, True
    with LLM(str(checkpoint("qwen3")), attention_backend="triton", **SMALL) as llm:
        with watched(llm, monkeypatch) as waits:
            outputs = llm.generate([[1, 2, 3], [7] * 20], params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 3]
        assert not waits
