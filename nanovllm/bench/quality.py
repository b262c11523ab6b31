"""What quantization costs: a model's predictions of a text, held to the unquantized ones.

Both models read the text in windows through their engines, prefill chunks and KV cache included, so
that the figures have everything in them that a request meets.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.bench.machine import Machine, inspect_machine
from nanovllm.config import QUANTIZED_METHODS, EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from nanovllm.llm import LLM

SLICE = 128
"""Positions whose logits are compared at a time: twice 80 MB of a 150k vocabulary."""


@dataclass(frozen=True, slots=True)
class QualityResult:
    """How two models predict the same tokens.

    Args:
        num_tokens: Predicted tokens.
        num_windows: Windows they came in; the first token of each is given.
        reference_bits: Mean of -log2 of the actual token's probability, by the reference.
        bits: The same, by the model.
        agreement: Share of positions where both find the same token the most likely.
        kl_divergence: Mean divergence of the model's distribution from the reference's, in nats.
        reference: What the reference ran with.
        settings: What the model ran with.
        machine: What both ran on.
    """

    num_tokens: int
    num_windows: int
    reference_bits: float
    bits: float
    agreement: float
    kl_divergence: float
    reference: dict[str, Any]
    settings: dict[str, Any]
    machine: Machine

    @property
    def perplexity(self) -> float:
        return float(2**self.bits)

    @property
    def reference_perplexity(self) -> float:
        return float(2**self.reference_bits)


def reference_config(config: EngineConfig, model: str | None = None) -> EngineConfig:
    """The options of what a model is held to: its own dtype, and nothing quantized.

    Args:
        config: Options of the model.
        model: Another checkpoint, of the same tokenizer; needed if the model's is quantized.

    Raises:
        InvalidRequestError: That would be the model itself.
    """
    reference = replace(
        config,
        model=model or config.model,
        quantization=None,
        kv_cache_dtype="auto",
        dtype="auto",
    )
    if config.quantization in QUANTIZED_METHODS:  # says no more than the checkpoint does
        config = replace(config, quantization=None)
    if reference == config:
        raise InvalidRequestError(
            "nothing to compare: say --quantization, --kv-cache-dtype or --dtype, or name an "
            "unquantized checkpoint with --reference"
        )
    return reference


def quality_options(config: EngineConfig, context: int) -> EngineConfig:
    """The options with which a model reads windows of `context` tokens, one at a time.

    Raises:
        InvalidRequestError: The model's context does not hold a window and the token after it.
    """
    from nanovllm.models.hub import resolve_model
    from nanovllm.models.model_config import ModelConfig

    longest = ModelConfig.from_directory(resolve_model(config)).max_model_len - 1
    if context > longest:
        raise InvalidRequestError(
            f"context must be at most {longest} for this model, got {context}", "context"
        )
    return replace(
        config,
        max_model_len=context + 1,  # the engine always generates a token
        max_num_seqs=1,
        enable_prefix_caching=False,
        async_scheduling=False,
    )


def run_quality(
    llm: "LLM",
    reference: "LLM",
    text: str,
    *,
    context: int,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> QualityResult:
    """Compare two models on a text.

    Args:
        llm: The model, started with `quality_options`.
        reference: What it is held to, likewise.
        text: What they predict.
        context: Tokens of a window; windows do not overlap.
        max_windows: Windows to read at most.
        on_window: Called after each window with how many are done, and of how many.

    Raises:
        InvalidRequestError: The models have different vocabularies, or the text is too short.
    """
    if llm.model_config.vocab_size != reference.model_config.vocab_size:
        raise InvalidRequestError("the models have different vocabularies", "reference")
    token_ids = reference.encode(text)
    windows = [token_ids[i : i + context] for i in range(0, len(token_ids), context)]
    windows = [window for window in windows if len(window) > 1][:max_windows]
    if not windows:
        raise InvalidRequestError("the text has less than two tokens", "text")
    totals = [0.0] * 4
    for done, window in enumerate(windows, start=1):
        for index, value in enumerate(_compare(llm, reference, window)):
            totals[index] += value
        if on_window is not None:
            on_window(done, len(windows))
    num_tokens = sum(len(window) - 1 for window in windows)
    bits, reference_bits, agreement, divergence = (total / num_tokens for total in totals)
    return QualityResult(
        num_tokens=num_tokens,
        num_windows=len(windows),
        reference_bits=reference_bits / math.log(2),
        bits=bits / math.log(2),
        agreement=agreement,
        kl_divergence=divergence,
        reference=_settings(reference),
        settings=_settings(llm),
        machine=inspect_machine(),
    )


def _compare(llm: "LLM", reference: "LLM", window: list[int]) -> tuple[float, float, float, float]:
    """Sums over a window: losses of both in nats, positions that agree, and divergence."""
    import torch

    loss = reference_loss = agreeing = divergence = 0.0
    targets = torch.tensor(window[1:])
    hidden, expected_hidden = hidden_states(llm, window), hidden_states(reference, window)
    for first in range(0, len(targets), SLICE):
        rows = slice(first, min(first + SLICE, len(targets)))
        found = log_probs(llm, hidden[rows])
        expected = log_probs(reference, expected_hidden[rows])
        index = targets[rows, None]
        loss -= float(found.gather(1, index).sum())
        reference_loss -= float(expected.gather(1, index).sum())
        agreeing += float((found.argmax(-1) == expected.argmax(-1)).sum())
        divergence += float((expected.exp() * (expected - found)).sum())
    return loss, reference_loss, agreeing, divergence


def hidden_states(llm: "LLM", window: list[int]) -> "Tensor":
    """What the model ends with at each position: `[len(window), hidden_size]`."""
    import torch

    # Scores of the prompt: otherwise its other positions would end in the last layer.
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    with _recorded(llm) as chunks:
        llm.generate([window], params, use_tqdm=False)
    return torch.cat(chunks)


@contextmanager
def _recorded(llm: "LLM") -> "Iterator[list[Tensor]]":
    """Collect the hidden states of all steps, in order."""
    chunks: list[Tensor] = []
    hook = llm._runner.model.register_forward_hook(
        lambda _module, _inputs, hidden: chunks.append(hidden)
    )
    try:
        yield chunks
    finally:
        hook.remove()


def log_probs(llm: "LLM", hidden: "Tensor") -> "Tensor":
    """The next-token distributions of hidden states, in nats: `[num_rows, vocab_size]`."""
    import torch

    model, kernels = llm._runner.model, llm._runner.kernels
    with torch.inference_mode(), kernels.running():
        return model.compute_logits(hidden, kernels).log_softmax(-1).cpu()


def _settings(llm: "LLM") -> dict[str, Any]:
    config = llm.config
    return {
        "model": config.model or "bundled demo model",
        "dtype": config.dtype,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "device": config.device,
        "kernels": llm._runner.kernels.name,
    }
