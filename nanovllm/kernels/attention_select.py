"""Which backends compute attention."""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from nanovllm.config import DEFAULT_BLOCK_SIZE
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels import flash, flashinfer
from nanovllm.kernels.attention_backend import AttentionBackend, AttentionConfig
from nanovllm.kernels.paired_attention import PairedAttention
from nanovllm.kernels.sdpa import SdpaBackend

logger = logging.getLogger(__name__)

HALF_TYPES = (torch.float16, torch.bfloat16)
PREFILL_ORDER = ("flash-attn", "triton", "sdpa")
"""What "auto" takes for prompts: the first that can serve."""
DECODE_ORDER = ("triton", "flash-attn", "sdpa")
"""And for decodes. FlashInfer only serves who names it: it may compile for minutes at first."""


class Registered(NamedTuple):
    """A backend: what there is to say against it here, empty if nothing, and how it is made."""

    problem: Callable[[AttentionConfig, torch.device], str]
    make: Callable[[AttentionConfig, torch.device], AttentionBackend]


def select_attention(config: AttentionConfig, device: torch.device) -> AttentionBackend:
    """The backends that `config.backend` names, or the best there are; the log has which and why.

    Those of our CPU kernels are not among them: `CpuKernels` has its own.

    Raises:
        InvalidRequestError: What is named cannot serve here; the message says why.
    """
    if config.backend == "auto":
        (prefill, against), (decode, more) = (
            _first(order, config, device) for order in (PREFILL_ORDER, DECODE_ORDER)
        )
        reason = "; ".join(dict.fromkeys([*against, *more])) or "the best there is"
    else:
        names = config.backend.split(",")
        for name in names:
            if problem := _problem(name, config, device):
                raise _refusal(config.backend, problem)
        prefill, decode, reason = names[0], names[-1], "as asked for"
    phases = "prefill and decode" if prefill == decode else f"prefill, {decode} for decode"
    logger.info("attention: %s for %s (%s)", prefill, phases, reason)
    if prefill == decode and prefill in ("triton", "sdpa"):
        return REGISTRY[prefill].make(config, device)
    # Triton's writes in one launch where the others' takes several.
    writer = decode if _problem("triton", config, device) else "triton"
    made = {name: REGISTRY[name].make(config, device) for name in {prefill, decode, writer}}
    return PairedAttention(made[prefill], made[decode], made[writer])


def default_block_size(backend: str, device: torch.device) -> int:
    """The `block_size` of who names none, under an `attention_backend`."""
    if device.type == "cuda" and "flash-attn" in backend.split(","):
        version, _ = flash_attn_version(device)
        return max(DEFAULT_BLOCK_SIZE, flash.BLOCK_MULTIPLE.get(version, 1))
    return DEFAULT_BLOCK_SIZE


def triton_problem(device: torch.device) -> str:
    """Why Triton kernels do not run on a device; empty if they do."""
    if device.type not in ("cuda", "cpu"):
        return f"triton does not run on {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            return "triton needs a CUDA device; on a CPU it has an interpreter, for tests"
    return ""


def flash_attn_version(device: torch.device) -> tuple[int, str]:
    """The newest version of flash-attn that runs on a GPU, or 0 and the reason."""
    capability = torch.cuda.get_device_capability(device)
    problem = ""
    for version, package in flash.PACKAGES.items():
        if find_spec(package) is None:
            continue
        fits = capability[0] == 9 if version == 3 else capability >= (8, 0)
        if not fits:
            problem = problem or f"flash-attn {version} has no kernels for this GPU"
        elif broken := _import_problem(package):
            problem = problem or broken
        else:
            return version, ""
    return 0, problem or "flash-attn is not installed"


def _first(
    order: tuple[str, ...], config: AttentionConfig, device: torch.device
) -> tuple[str, list[str]]:
    """The first backend that can serve, and what there is to say against those before it."""
    against: list[str] = []
    if device.type != "cuda":
        order = ("sdpa",)
    for name in order:
        if not (problem := _problem(name, config, device)):
            return name, against
        against.append(problem)
    raise _refusal("auto", "; ".join(against))


def _problem(name: str, config: AttentionConfig, device: torch.device) -> str:
    problem = REGISTRY[name].problem(config, device)
    if not problem and config.deterministic and name != "triton":
        return f"{name} is not deterministic"
    return problem


def _triton_problem(config: AttentionConfig, device: torch.device) -> str:
    if problem := triton_problem(device):
        return problem
    from nanovllm.kernels.triton.attention import MAX_HEAD_DIM

    if config.head_dim > MAX_HEAD_DIM:
        return f"triton takes heads of up to {MAX_HEAD_DIM}, and these have {config.head_dim}"
    return ""


def _flash_problem(config: AttentionConfig, device: torch.device) -> str:
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, not {device.type}"
    version, problem = flash_attn_version(device)
    if problem:
        return problem
    if config.dtype not in HALF_TYPES:
        return f"flash-attn needs float16 or bfloat16, not {_short(config.dtype)}"
    if config.head_dim % 8 or config.head_dim > 256:
        return f"flash-attn has no kernel for heads of {config.head_dim}"
    if config.block_size % (multiple := flash.BLOCK_MULTIPLE[version]):
        return (
            f"flash-attn {version} needs a block_size that is a multiple of {multiple}, not "
            f"{config.block_size}"
        )
    return ""


def _flashinfer_problem(config: AttentionConfig, device: torch.device) -> str:
    if device.type != "cuda":
        return f"flashinfer needs a CUDA device, not {device.type}"
    if find_spec(flashinfer.PACKAGE) is None:
        return "flashinfer is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flashinfer needs a GPU of capability 8.0 or more"
    if broken := _import_problem(flashinfer.PACKAGE):
        return broken
    if config.dtype not in HALF_TYPES:
        return f"flashinfer needs float16 or bfloat16, not {_short(config.dtype)}"
    if config.head_dim not in flashinfer.HEAD_DIMS:
        return f"flashinfer has no kernel for heads of {config.head_dim}"
    return ""


def _cpu_problem(_config: AttentionConfig, device: torch.device) -> str:
    if device.type == "cpu":
        return "'cpu' needs our CPU kernels, and they do not run here"
    return f"'cpu' needs a CPU, not {device.type}"


def _no_problem(_config: AttentionConfig, _device: torch.device) -> str:
    return ""


def _import_problem(package: str) -> str:
    """A package built for another torch is installed and yet cannot be imported."""
    try:
        import_module(package)
    except (ImportError, OSError) as e:
        return f"{package} cannot be imported: {str(e).splitlines()[0] if str(e) else e!r}"
    return ""


def _make_triton(config: AttentionConfig, _device: torch.device) -> AttentionBackend:
    from nanovllm.kernels.triton.attention import TritonAttention

    return TritonAttention(config)


def _make_flash(config: AttentionConfig, device: torch.device) -> AttentionBackend:
    version, _ = flash_attn_version(device)
    return flash.FlashAttention(config, version)


def _make_sdpa(config: AttentionConfig, _device: torch.device) -> AttentionBackend:
    return SdpaBackend(config)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(backend: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"attention_backend={backend!r} cannot be used: {problem}", "attention_backend"
    )


REGISTRY = {
    "triton": Registered(_triton_problem, _make_triton),
    "flash-attn": Registered(_flash_problem, _make_flash),
    "flashinfer": Registered(_flashinfer_problem, flashinfer.FlashInferAttention),
    "sdpa": Registered(_no_problem, _make_sdpa),
    "cpu": Registered(_cpu_problem, _make_sdpa),  # `CpuKernels` makes it
}
