"""Embeddings: those of transformers, whatever shares a step with them, and what cannot be had."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nanovllm import LLM, AsyncLLM, LoRARequest, SamplingParams
from nanovllm.errors import ContextLengthError, InvalidRequestError, UnsupportedModelError
from nanovllm.outputs import EmbeddingRequestOutput
from nanovllm.text.embeddings import embedding_of
from tests.conftest import TINY, spread_out
from tests.peft_oracle import merged, write_peft
from tests.small_engine import SMALL

PROMPTS = [[5], [7, 8, 9], list(range(60)), list(range(60, 160)), [*range(60), 3, 1], [2] * 17]


def reference(model: Any, prompts: list[list[int]] = PROMPTS) -> np.ndarray:
    """What sentence-transformers does with a model that pools the last token."""
    with torch.inference_mode():
        states = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
        return np.asarray(torch.nn.functional.normalize(torch.stack(states), dim=-1))


def embeddings(outputs: list[EmbeddingRequestOutput]) -> np.ndarray:
    return np.array([output.outputs.embedding for output in outputs], np.float32)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen2-window", "llama-bias", "mistral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cpu_isa": "torch"}, {"max_num_batched_tokens": 8}, {"num_kv_blocks": 9}],
    ids=["kernels", "torch", "chunked", "few-blocks"],
)
def test_they_are_those_of_transformers(
    checkpoint: Callable[[str], Path], name: str, options: dict[str, Any]
) -> None:
    directory = checkpoint(name)
    expected = reference(transformers.AutoModel.from_pretrained(directory).eval())
    with LLM(str(directory), **SMALL | options) as llm:
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        again = llm.embed(PROMPTS, use_tqdm=False)
        assert llm.engine.stats().num_used_blocks == 0
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert all(output.finished for output in outputs)
    np.testing.assert_allclose(embeddings(outputs), expected, atol=2e-5)
    np.testing.assert_allclose(embeddings(again), expected, atol=2e-5)
    if not options:
        assert [output.num_cached_tokens > 0 for output in again] == [
            len(ids) > 16 for ids in PROMPTS
        ]


def test_they_share_steps_with_what_is_generated(checkpoint: Callable[[str], Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=1)
    with LLM(str(checkpoint("qwen3")), **SMALL) as llm:
        alone = embeddings(llm.embed(PROMPTS, use_tqdm=False))
        told = llm.generate([1, 2, 3], greedy, use_tqdm=False)[0]
        stream = llm.stream([1, 2, 3], greedy)
        next(stream)
        beside = embeddings(llm.embed(PROMPTS, use_tqdm=False))
        (*_, last) = stream
        assert last["token_ids"] == told["token_ids"]
    np.testing.assert_allclose(beside, alone, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_the_body_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool
) -> None:
    shape: dict[str, Any] = TINY | {"head_dim": 32, "tie_word_embeddings": tied}
    model: Any = transformers.Qwen3Model(transformers.Qwen3Config(**shape))
    spread_out(model)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("Qwen3Model", "Qwen3ForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [name]}))
        with LLM(str(tmp_path), **SMALL) as llm:
            outputs = llm.embed(PROMPTS, use_tqdm=False)
        np.testing.assert_allclose(embeddings(outputs), reference(model), atol=2e-5)
    assert ("it embeds, but what it writes is void" in caplog.text) is not tied
    with LLM(str(tmp_path), **SMALL, quantization="int8") as llm:
        rough = embeddings(llm.embed(PROMPTS, use_tqdm=False))
    assert (rough * embeddings(outputs)).sum(-1).min() > 0.99


def test_they_go_through_adapters(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoint("qwen3")
    write_peft(directory, tmp_path)
    expected = reference(merged(directory, tmp_path).model)
    with LLM(str(directory), **SMALL) as llm:
        outputs = llm.embed(
            PROMPTS, use_tqdm=False, lora_request=LoRARequest("a", 1, str(tmp_path))
        )
    np.testing.assert_allclose(embeddings(outputs), expected, atol=2e-5)


def test_texts_prefixes_of_numbers_and_truncation() -> None:
    with LLM(max_model_len=64, dtype="float32") as llm:
        whole, one = (
            llm.embed("Once upon a time", dimensions=n, use_tqdm=False)[0] for n in (None, 16)
        )
        size = llm.model_config.hidden_size
        assert whole.outputs.hidden_size == size
        assert np.linalg.norm(whole.outputs.embedding) == pytest.approx(1, abs=1e-6)
        part = np.array(whole.outputs.embedding[:16])
        np.testing.assert_allclose(one.outputs.embedding, part / np.linalg.norm(part), atol=1e-6)
        long = "Once upon a time there was a king. " * 40
        with pytest.raises(ContextLengthError):
            llm.embed(long)
        (cut,) = llm.embed(long, truncate_prompt_tokens=-1, use_tqdm=False)
        assert cut.prompt_token_ids == llm.encode(long)[:64]
        with pytest.raises(ContextLengthError):
            llm.embed([llm.encode(long)[:65]])
        assert llm.tokenizer is not None
        end = min(llm.tokenizer.special_ids)
        (ended,) = llm.embed([*llm.encode(long), end], truncate_prompt_tokens=9, use_tqdm=False)
        assert ended.prompt_token_ids == [*llm.encode(long)[:8], end]
        for wrong in (0, -1, size + 1, "8", 2.5):
            with pytest.raises(InvalidRequestError, match="dimensions must be"):
                llm.embed("A", dimensions=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            llm.embed([[1, 2], []])
        assert llm.embed([]) == []
        assert not llm.has_unfinished()


TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "st.base.modules.Pooling"
NORMALIZE, DENSE = "sentence_transformers.models.Normalize", "sentence_transformers.models.Dense"


@pytest.mark.parametrize(
    ("modules", "modes", "reason"),
    [
        ([TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode_lasttoken": True}, None),
        ([TRANSFORMER, POOLING], {"pooling_mode": "lasttoken"}, None),
        ([TRANSFORMER, POOLING], {"pooling_mode": "mean"}, "pooling by mean"),
        ([TRANSFORMER, POOLING], {"pooling_mode": ["lasttoken", "max"]}, "pooling by max"),
        ([POOLING], {"pooling_mode_mean_tokens": True}, "pooling by mean_tokens"),
        ([TRANSFORMER, POOLING, DENSE], {"pooling_mode": "lasttoken"}, "Dense"),
    ],
)
def test_what_embeds_in_another_way_is_refused(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    modules: list[str],
    modes: dict[str, Any],
    reason: str | None,
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), directory)
    pooling = directory / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    sizes = {"word_embedding_dimension": 64, "include_prompt": True}
    (directory / "modules.json").write_text(json.dumps([{"type": of} for of in modules]))
    pooling.write_text(json.dumps(sizes | modes))
    with LLM(str(directory), **SMALL) as llm:
        if reason is None:
            assert len(llm.embed([1, 2], use_tqdm=False)) == 1
        else:
            with pytest.raises(InvalidRequestError, match=f"are made by {reason}, which"):
                llm.embed([1, 2])
        assert llm.generate([1, 2], SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_model_that_looks_both_ways_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("qwen2"), directory)
    config = json.loads((directory / "config.json").read_text()) | {"is_causal": False}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="attention in both directions"):
        LLM(str(directory), **SMALL)


def test_states_that_are_no_numbers_are_an_error(checkpoint: Callable[[str], Path]) -> None:
    with LLM(str(checkpoint("qwen3")), **SMALL) as llm:
        next(llm._runner.model.parameters()).data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="ended without an embedding: error, the model's"):
            llm.embed([1, 2], use_tqdm=False)
        assert not llm.has_unfinished()


def test_a_state_of_zeros_stays_so() -> None:
    assert embedding_of(bytes(32)).tolist() == [0.0] * 8


def test_engine_processes_make_the_same(checkpoint: Callable[[str], Path]) -> None:
    directory = str(checkpoint("qwen3"))
    with LLM(directory, **SMALL) as llm:
        expected = embeddings(llm.embed(PROMPTS, use_tqdm=False))

    async def scenario() -> list[EmbeddingRequestOutput]:
        async with AsyncLLM(directory, **SMALL) as engine:
            with pytest.raises(InvalidRequestError, match="between 1 and 64"):
                await engine.embed([1], dimensions=65)
            short = await engine.embed([7, 8, 9], dimensions=8)
            assert short.outputs.hidden_size == 8
            return await asyncio.gather(*(engine.embed(prompt) for prompt in PROMPTS))

    np.testing.assert_allclose(embeddings(asyncio.run(scenario())), expected, atol=1e-5)
