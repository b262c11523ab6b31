"""Tiny checkpoints that the suite shares, made with transformers."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.triton_interpreter import use_interpreter
from tests.voxcpm_checkpoint import make_model_dir

if not torch.cuda.is_available():
    use_interpreter()

# A job that a script starts in the background is deaf to Ctrl-C; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The checkpoints are so small that threads cost more than they give.
torch.set_num_threads(1)

TALKING = (
    "async",
    "bench_serve",
    "bench_speech",
    "cli",
    "control",
    "examples",
    "faults",
    "forms",
    "parallel",
    "ranks",
    "server",
    "attacks",
    "speech_engine",
    "speech_streams",
    "structured",
    "worker",
)
"""In the names of files whose tests start processes, or wait for threads."""

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 32, **EXPERTS, "mlp_only_layers": [1]}),
    "qwen3-moe-step": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen3-moe-window": (  # which all layers have, whatever `layer_types` says
        "Qwen3Moe",
        {
            **EXPERTS,
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-dynamic-short": (
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
    ),
    "llama-yarn": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama3": ("Llama", {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_local_base_freq": 100.0,
            "tie_word_embeddings": False,  # or each token would be followed by itself
        },
    ),
}


def spread_out(model: torch.nn.Module) -> None:
    """Scale the weights so that logits have a standard deviation of 2 or more.

    Greedy tokens of a freshly initialised model hang on the last bits of near-equal logits.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(noise * 0.4)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)


def make_checkpoint(directory: Path, family: str, **overrides: Any) -> Path:
    """Write a tiny random checkpoint of a family as transformers writes it."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config_class = getattr(transformers, name)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(**TINY | overrides))
    spread_out(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a name in `CHECKPOINTS` to its directory, each written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family, overrides = CHECKPOINTS[name]
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), family, **overrides)
        return made[name]

    return get


@pytest.fixture(scope="session")
def speech_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a kind of VoxCPM to a tiny checkpoint's directory, each written once.

    It takes what `voxcpm_checkpoint.make_model_dir` does: the kind ("v1", "v1.5" or "v2"), and by
    name `seed`, `stop_bias`, `dtype`, `use_mup` and `long_ctx`. Copy a directory before you change
    it.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def get(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"voxcpm-{kind}")
            make_model_dir(made[key], kind, **options)
        return made[key]

    return get


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, tests of processes that talk run one after the other, in one worker.

    They hold others to times, and would miss them if there were more at work than cores.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        folder = path.parent.name
        if folder in ("server", "acceptance", "gpu") or any(word in path.name for word in TALKING):
            item.add_marker(pytest.mark.xdist_group("talking"))
