"""Names of the attention backends: ours, vLLM's and the family's."""

from nanovllm.errors import InvalidRequestError

ATTENTION_BACKENDS = ("auto", "triton", "flash-attn", "flashinfer", "sdpa", "cpu")
"""What `attention_backend` may be; two of those between the first and the last make a pair."""

_ALIASES = {
    "triton-attn": "triton",
    "flash-attention": "flash-attn",
    "flash-attention-2": "flash-attn",
    "flash-attention-3": "flash-attn",
    "fa": "flash-attn",
    "fa2": "flash-attn",
    "fa3": "flash-attn",
    "fi": "flashinfer",
    "torch-sdpa": "sdpa",
    "eager": "sdpa",
}


def attention_backend_name(given: str) -> str:
    """Our name for a backend, or for a pair of them, "PREFILL,DECODE".

    Args:
        given: Ours or another engine's, in any case, with `_` or `-`.

    Raises:
        InvalidRequestError: There is no such backend; the message lists those there are.
    """
    names = [_name(part) for part in given.split(",")]
    if len(names) > 2:
        raise _refusal(f"must be one backend, or two as 'PREFILL,DECODE', got {given!r}")
    if len(set(names)) > 1 and not {"auto", "cpu"}.isdisjoint(names):
        raise _refusal(f"{given!r} pairs what stands alone: 'auto' and 'cpu' make no pairs")
    return ",".join(dict.fromkeys(names))


def _name(given: str) -> str:
    spelled = given.strip().lower().replace("_", "-").removesuffix("-vllm-v1")
    name = _ALIASES.get(spelled, spelled)
    if name in ("trtllm", "trtllm-gen"):
        raise _refusal(f"{given.strip()!r} is not supported; 'flashinfer' is nearest to it")
    if name not in ATTENTION_BACKENDS:
        known = ", ".join(ATTENTION_BACKENDS)
        raise _refusal(f"must be one of {known}, or two as 'PREFILL,DECODE', got {given!r}")
    return name


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"attention_backend {reason}", "attention_backend")
