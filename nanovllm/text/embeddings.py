"""Embeddings: what a model makes of a prompt as a whole, to compare it with others.

A prompt's embedding is the hidden state of its last token, after the final norm, brought to length
1: what Qwen3-Embedding and other embedding models with a causal decoder were trained for (Zhang et
al. 2025, "Qwen3 Embedding", section 2). Their tokenizers end a text with a token just for that.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm.errors import InvalidRequestError
from nanovllm.models.model_config import read_json
from nanovllm.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput

POOLING, MODULES = Path("1_Pooling") / "config.json", Path("modules.json")
"""Where the checkpoints of sentence-transformers say what makes embeddings of hidden states."""
OURS = {"Transformer", "Pooling", "Normalize"}
"""The modules that do what we do."""


def unsupported_pooling(directory: Path) -> str | None:
    """What a checkpoint makes embeddings by that we do not implement; None is nothing.

    Raises:
        InvalidRequestError: A file that says it cannot be read.
    """
    made_by = []
    if (directory / MODULES).is_file():
        try:
            modules = json.loads((directory / MODULES).read_text())
            kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        except (ValueError, KeyError, TypeError) as e:
            raise InvalidRequestError(f"{directory / MODULES} cannot be read: {e}", "model") from e
        made_by += [kind for kind in kinds if kind not in OURS]
    if (directory / POOLING).is_file():
        modes = _pooling_modes(read_json(directory / POOLING))
        made_by += [f"pooling by {mode}" for mode in modes if mode != "lasttoken"]
    return ", ".join(made_by) or None


def _pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """The ways to pool that are on, as their versions before and since 5.4 write them."""
    given = config.get("pooling_mode")
    if given is not None:
        return [given] if isinstance(given, str) else list(given)
    prefix = "pooling_mode_"
    return [key[len(prefix) :] for key, on in config.items() if key.startswith(prefix) and on]


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
