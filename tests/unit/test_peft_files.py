"""PEFT's checkpoints of adapters: what is read, and what is refused and by which name."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.adapter_settings import AdapterSettings, peft_settings
from nanovllm.models.adapters import AdapterTable
from nanovllm.worker.loading import load_engine
from tests.conftest import EXPERTS, make_checkpoint
from tests.peft_oracle import EVERY_LAYER, write_peft
from tests.small_engine import SMALL

QUERY = "model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.fixture(scope="module")
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def table(base: Path) -> AdapterTable:
    adapters = load_engine(EngineConfig(**SMALL), base).runner.adapters
    assert isinstance(adapters, AdapterTable)
    return adapters


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_peft(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def directory(adapter: Path, tmp_path: Path) -> Path:
    """A good adapter, to be spoiled."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def change(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refused(table: AdapterTable, directory: Path, *parts: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        table.load(10_000, directory)
    for part in parts:
        assert part in str(caught.value)
    assert 10_000 not in table


def test_pickled_tensors(table: AdapterTable, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    torch.save(load_file(path), directory / "adapter_model.bin")
    path.unlink()
    assert f"{QUERY}.lora_A" in table.load(1, directory)


def test_a_pickle_that_would_run_code(table: AdapterTable, directory: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (directory / "ran",)

    (directory / "adapter_model.safetensors").unlink()
    torch.save({"a": Code()}, directory / "adapter_model.bin")
    refused(table, directory, "adapter_model.bin is not a readable file of tensors")
    assert not (directory / "ran").exists()


def test_missing_weights(table: AdapterTable, directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    refused(table, directory, "has neither adapter_model.safetensors nor adapter_model.bin")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("use_something_new", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"the LoRA has {name}=.* cannot be served"):
        peft_settings(CONFIG | {name: value})


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 7]
)
def test_adapters_of_other_base_weights(init: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"trained with init_lora_weights=.*convert it"):
        peft_settings(CONFIG | {"init_lora_weights": init})


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": False, "use_rslora": False, "modules_to_save": None, "bias": "none"},
        {"loftq_config": {"bits": 4}, "eva_config": {"rho": 2}, "init_lora_weights": "eva"},
        {"init_lora_weights": False, "fan_in_fan_out": True, "peft_version": "0.18.0"},
        {"rank_pattern": None, "alpha_pattern": {}, "megatron_config": None},
    ],
)
def test_what_changes_nothing(more: dict[str, object]) -> None:
    assert peft_settings(CONFIG | more) == AdapterSettings(8, 16.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": None}, "r must be an integer above 0, got None"),
        ({"r": True}, "r must be an integer above 0"),
        ({"r": 0}, "r must be an integer above 0"),
        ({"r": 2.5}, "r must be an integer above 0"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number above 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern q_proj must be an integer above 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern q_proj must be a number above 0"),
        ({"alpha_pattern": {"(": 1}}, "which is no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "repeats no group"),
        ({"alpha_pattern": {"(.|.)*b": 1}}, "repeats no group"),
        ({"alpha_pattern": {".*.*.*.*b": 1}}, "could take for ever"),
        ({"alpha_pattern": {"a{1,}b{1,}.*.*": 1}}, "could take for ever"),
        ({"alpha_pattern": {".?" * 60 + "b": 1}}, "could take for ever"),
        ({"alpha_pattern": {"(.|.)" * 30 + "b": 1}}, "could take for ever"),
        ({"rank_pattern": {f".*.*.*{n}": 1 for n in range(20)}}, "could take for ever"),
        ({"alpha_pattern": {"a" * 257: 1}}, "at most 256 characters"),
        ({"alpha_pattern": {"?" * 10_000: 1}}, "at most 256 characters"),
        ({"alpha_pattern": {str(n): 1 for n in range(1025)}}, "at most 1024 names"),
    ],
)
def test_settings_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        peft_settings(CONFIG | changes)


def test_the_first_pattern_that_fits_counts() -> None:
    settings = peft_settings(
        CONFIG
        | {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}, "use_rslora": True}
        | {"alpha_pattern": {"self_attn": 5, "^q_proj": 6, "(q|k)_proj": 9}}
    )
    assert settings.rank_of(QUERY) == 2
    assert settings.rank_of("model.layers.0.self_attn.q_proj") == 3
    assert settings.rank_of("model.layers.0.self_attn.xq_proj") == 8
    assert settings.scale_of(QUERY, 2) == 9 / 2**0.5
    assert settings.scale_of("model.layers.0.mlp.up_proj", 4) == 8


@pytest.mark.parametrize("pattern", [".*.*.*x", "[a-z.]+[a-z.]+[a-z.]+x", "(a|b|.*)(a|.*)(.*)x"])
def test_patterns_that_match_slowly_match_all_the_same(pattern: str) -> None:
    settings = peft_settings(CONFIG | {"rank_pattern": {pattern: 2}})
    started = time.process_time()
    settings.rank_of("model.layers.31.self_attn.q_proj")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_configs_that_are_no_objects(table: AdapterTable, directory: Path, text: str) -> None:
    (directory / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(table, directory, "adapter_config.json", "JSON")


def test_mistakes_of_the_config_name_its_file(table: AdapterTable, directory: Path) -> None:
    config = json.dumps(CONFIG | {"use_dora": True})
    (directory / "adapter_config.json").write_text(config, encoding="utf-8")
    refused(table, directory, "adapter_config.json: the LoRA has use_dora=True")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "lm_head.base_layer.weight",
        "lm_head.modules_to_save.weight",
    ],
)
def test_tensors_that_are_no_matrices_of_an_adapter(
    table: AdapterTable, directory: Path, name: str
) -> None:
    name = f"base_model.model.{name}"
    change(directory, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    refused(table, directory, f"a tensor {name}, which cannot be served")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("lm_head", "changes lm_head, which the engine's options do not allow"),
        ("model.layers.9.self_attn.q_proj", "belongs to no linear layer"),
        ("model.layers.0.self_attn.qkv_proj", "belongs to no linear layer"),
        ("model.layers.0.input_layernorm", "belongs to no linear layer"),
    ],
)
def test_modules_that_have_no_adapters(
    table: AdapterTable, directory: Path, module: str, message: str
) -> None:
    prefix = f"base_model.model.{module}"
    more = {
        f"{prefix}.lora_A.weight": torch.zeros(4, 64),
        f"{prefix}.lora_B.weight": torch.zeros(320, 4),
    }
    change(directory, lambda tensors: tensors.update(more))
    refused(table, directory, message)


def test_experts_have_no_adapters(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoint("qwen3-moe")
    table = load_engine(EngineConfig(**SMALL), directory).runner.adapters
    assert isinstance(table, AdapterTable)
    write_peft(directory, tmp_path / "all", modules=EVERY_LAYER)
    refused(table, tmp_path / "all", "layers.0.mlp.experts.0.down_proj", "of experts are not")
    assert table.load(1, write_peft(directory, tmp_path / "attention"))


def test_an_engine_in_which_no_layer_may_have_an_adapter(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "Qwen3Moe", **EXPERTS)
    config = EngineConfig(**SMALL | {"lora_target_modules_lm": ["gate_proj", "up_proj"]})
    with pytest.raises(InvalidRequestError, match="no layer of this model may have an adapter"):
        load_engine(config, directory)


def test_ranks_are_what_the_config_says(table: AdapterTable, directory: Path) -> None:
    name = f"base_model.model.{QUERY}.lora_A.weight"
    change(directory, lambda tensors: tensors.update({name: torch.zeros(5, 64)}))
    refused(table, directory, f"{QUERY}.lora_A", "of shape [5, 64], and the model needs", "[4, 64]")


def test_half_an_adapter(table: AdapterTable, directory: Path) -> None:
    change(directory, lambda tensors: tensors.pop(f"base_model.model.{QUERY}.lora_B.weight"))
    refused(table, directory, f"no tensor {QUERY}.lora_B")
