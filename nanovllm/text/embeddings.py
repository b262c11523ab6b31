"""Embeddings: what a model makes of a prompt as a whole, to compare it with others.

A prompt's embedding is the hidden state of its last token, after the final norm, brought to length
1: what Qwen3-Embedding and other embedding models with a causal decoder were trained for (Zhang et
al. 2025, "Qwen3 Embedding", section 2). Their tokenizers end a text with a token just for that.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanovllm.models.model_config import read_json
from nanovllm.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput

POOLING = Path("1_Pooling") / "config.json"
"""Where the checkpoints of sentence-transformers say how the states of tokens become one."""
POOLING_MODES = {
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
}
"""The ways it knows besides the last token's."""


def other_pooling(directory: Path) -> list[str]:
    """How a checkpoint's embeddings are made, if not of the last token: ["mean_tokens"], say."""
    if not (directory / POOLING).is_file():
        return []
    modes = read_json(directory / POOLING).items()
    names = [name.removeprefix("pooling_mode_") for name, value in modes if value is True]
    return sorted({*names} & POOLING_MODES)


def embedding_of(state: bytes, dimensions: int | None = None) -> npt.NDArray[np.float32]:
    """The embedding that a hidden state is, or its first numbers, as long as 1.

    Args:
        state: float32 `[hidden_size]`.
        dimensions: How many numbers are wanted, of models that were trained to put what matters
            first (Kusupati et al. 2022, "Matryoshka representation learning"); None is all.
    """
    kept = np.frombuffer(state, np.float32)[:dimensions]
    length = np.linalg.norm(kept.astype(np.float64))
    return (kept / (length or 1.0)).astype(np.float32)


def embedding_output(output: RequestOutput, dimensions: int | None) -> EmbeddingRequestOutput:
    """A finished request's embedding.

    Raises:
        RuntimeError: The request ended without.
    """
    if output.embedding is None:
        raise RuntimeError(
            f"request {output.request_id} ended without an embedding: {output.finish_reason}, "
            f"{output.stop_reason}"
        )
    return EmbeddingRequestOutput(
        output.request_id,
        EmbeddingOutput(embedding_of(output.embedding, dimensions).tolist()),
        output.prompt_token_ids,
        output.num_cached_tokens,
    )
