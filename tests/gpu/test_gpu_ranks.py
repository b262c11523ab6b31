"""Tensor parallelism through NCCL: one rank on one GPU, captured; two on two."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.errors import RankDiedError
from nanovllm.layers.parallel import TensorParallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["Once upon a time", "The dog and the cat went to the park. " * 9 + "Then"]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_seqs": 8}


@pytest.mark.parametrize("ordered", [False, True])
def test_what_one_rank_exchanges_is_captured(tmp_path: Path, ordered: bool) -> None:
    device = torch.device("cuda", 0)
    ranks = TensorParallel.connect(0, 1, tmp_path / "meeting", device, ordered)
    assert ranks.minimum(3, 5) == [3, 5]
    x = torch.ones(4, 8, device=device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, None, stream, "thread_local"):
        total = ranks.all_reduce(x * 2)
        columns = ranks.all_gather_columns(x + 1, 8)
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert (total == 6).all()
    assert (columns == 4).all()
    ranks.abort()  # nobody waits for it, as it waits for the graph


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_write_what_one_does(enforce_eager: bool) -> None:
    tokens = []
    for size in (1, 2):
        with LLM(tensor_parallel_size=size, enforce_eager=enforce_eager, **OPTIONS) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
            if size == 2:
                os.kill(llm._runner._ranks.pids[0], 9)  # type: ignore[attr-defined]
                with pytest.raises(RankDiedError, match=r"rank 1 .* died: exit code -9"):
                    llm.generate(PROMPTS, GREEDY, False)
    assert tokens[0] == tokens[1]
