"""Directories of LoRA adapters: what is read, and what is refused and why."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.models.adapters import AdapterTable
from tests.lora_oracle import adapters_of, load_small, write_adapter

MakeCheckpoint = Callable[..., Path]
QUERY = "base_lm.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(speech_checkpoint: MakeCheckpoint) -> Path:
    return speech_checkpoint("v1", stop_bias=-1.0)


@pytest.fixture(scope="module")
def table(checkpoint: Path) -> AdapterTable:
    """For adapters of the attentions, of rank 4 at most."""
    return adapters_of(load_small(checkpoint, max_lora_rank=4))


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(checkpoint, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def directory(adapter: Path, tmp_path: Path) -> Path:
    """A good adapter, to be spoiled."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def refused(table: AdapterTable, directory: Path, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        table.load(10_000, directory)
    assert message in str(caught.value)
    assert 10_000 not in table


def change(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "lora_weights.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def configure(directory: Path, content: object) -> None:
    (directory / "lora_config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_tensors(table: AdapterTable, directory: Path, wrapped: bool) -> None:
    path = directory / "lora_weights.safetensors"
    tensors = load_file(path)
    path.unlink()
    torch.save({"state_dict": tensors} if wrapped else tensors, path.with_suffix(".ckpt"))
    assert table.load(1 + wrapped, directory) == sorted(tensors)


def test_an_id_is_used_once(table: AdapterTable, directory: Path) -> None:
    table.load(5_000, directory)
    table.unload(5_000)
    with pytest.raises(InvalidRequestError, match="the adapter id 5000 has been used before"):
        table.load(5_000, directory)
    assert 5_000 not in table


def test_names_of_a_compiled_model(table: AdapterTable, directory: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name.replace('.layers', '._orig_mod.layers')}"] = tensors.pop(name)

    plain = sorted(load_file(directory / "lora_weights.safetensors"))
    change(directory, rename)
    assert table.load(3, directory) == plain


@pytest.mark.parametrize(
    ("number", "config"),
    [
        (4, {"alpha": 8}),
        (5, {"rank": 4, "lora_alpha": 0.5}),
        (6, {"r": 4, "alpha": 8, "dropout": 0.1}),
    ],
)
def test_spellings_of_rank_and_alpha(
    table: AdapterTable, directory: Path, number: int, config: object
) -> None:
    configure(directory, {"lora_config": config})
    table.load(number, directory)


@pytest.mark.parametrize(
    "config",
    [
        [],
        {},
        {"r": 4, "alpha": 8},
        {"lora_config": None},
        {"lora_config": {"r": 4}},
        {"lora_config": {"r": "4", "alpha": 8}},
        {"lora_config": {"r": 0, "alpha": 8}},
        {"lora_config": {"r": True, "alpha": 8}},
        {"lora_config": {"r": 4, "alpha": 0}},
        {"lora_config": {"r": 4, "alpha": "8"}},
        {"lora_config": {"r": 4, "alpha": float("nan")}},
        {"lora_config": {"r": 4, "alpha": float("inf")}},
        {"lora_config": {"r": 4, "alpha": 10**400}},
    ],
)
def test_configs_that_are_refused(table: AdapterTable, directory: Path, config: object) -> None:
    configure(directory, config)
    refused(table, directory, "lora_config.json")


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000])
def test_configs_that_are_no_json(table: AdapterTable, directory: Path, text: str) -> None:
    (directory / "lora_config.json").write_text(text, encoding="latin-1")
    refused(table, directory, "cannot be read as JSON")


def test_missing_files(table: AdapterTable, directory: Path) -> None:
    refused(table, directory / "lora_config.json", "LoRA directory not found")
    refused(table, directory / "nowhere", "LoRA directory not found")
    refused(table, Path("a\0b"), "LoRA directory not found")
    refused(table, Path("~nobody-of-this-name/a"), "LoRA directory not found")
    refused(table, Path("/" + "a" * 4000), "/aaaa")
    (directory / "lora_weights.safetensors").unlink()
    refused(table, directory, "has neither lora_weights.safetensors nor lora_weights.ckpt")
    (directory / "lora_config.json").unlink()
    refused(table, directory, "LoRA config not found")


@pytest.mark.parametrize("name", ["lora_weights.safetensors", "lora_weights.ckpt"])
@pytest.mark.parametrize("content", [b"", b"no tensors at all", bytes(64)])
def test_weights_that_cannot_be_read(
    table: AdapterTable, directory: Path, name: str, content: bytes
) -> None:
    (directory / "lora_weights.safetensors").unlink()
    (directory / name).write_bytes(content)
    refused(table, directory, name)


@pytest.mark.parametrize(
    "content",
    [
        *([1], {"state_dict": [1]}, {1: torch.zeros(1)}, Path("x")),
        {f"{QUERY}.lora_A": torch.ones(4, 64).to_sparse()},
        {f"{QUERY}.lora_A": torch.ones(4, 64, device="meta")},
    ],
)
def test_pickles_of_something_else(table: AdapterTable, directory: Path, content: object) -> None:
    (directory / "lora_weights.safetensors").unlink()
    torch.save(content, directory / "lora_weights.ckpt")
    refused(table, directory, "lora_weights.ckpt")


def test_no_tensors(table: AdapterTable, directory: Path) -> None:
    save_file({}, directory / "lora_weights.safetensors")
    refused(table, directory, "is empty")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("base_lm.layers.0.self_attn.x_proj", "belongs to no linear layer"),
        ("base_lm.layers.99.self_attn.q_proj", "belongs to no linear layer"),
        ("base_lm.layers.0.input_layernorm", "belongs to no linear layer"),
        ("base_lm.layers.0.self_attn.qkv_proj", "belongs to no linear layer"),
        ("fusion_concat_proj", "belongs to no linear layer"),
        ("base_lm.layers.0.mlp.gate_proj", "options do not allow"),
        ("enc_to_lm_proj", "options do not allow"),
        ("feat_encoder.encoder.layers.0.self_attn.q_proj", "options do not allow"),
        ("fsq_layer.in_proj", "options do not allow"),
        ("stop_head", "options do not allow"),
    ],
)
def test_modules_that_have_no_adapters(
    table: AdapterTable, directory: Path, module: str, message: str
) -> None:
    more = {f"{module}.lora_A": torch.zeros(4, 64), f"{module}.lora_B": torch.zeros(64, 4)}
    change(directory, lambda tensors: tensors.update(more))
    refused(table, directory, message)
    refused(table, directory, module)


@pytest.mark.parametrize("suffix", ["lora_A.weight", "weight", "lora_C"])
def test_names_that_no_adapter_has(table: AdapterTable, directory: Path, suffix: str) -> None:
    name = f"base_lm.layers.0.self_attn.q_proj.{suffix}"
    change(directory, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    refused(table, directory, name)


def test_half_an_adapter(table: AdapterTable, directory: Path) -> None:
    change(directory, lambda tensors: tensors.pop(f"{QUERY}.lora_B"))
    refused(table, directory, f"no tensor {QUERY}.lora_B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_A": (5, 64), "lora_B": (64, 5)}, "shape [5, 64], and the model needs floats of"),
        ({"lora_A": (0, 64), "lora_B": (64, 0)}, "shape [0, 64], and the model needs floats of"),
        ({"lora_A": (256,)}, "shape [256], and the model needs floats of shape [4, 64]"),
        ({"lora_A": (4, 65)}, "shape [4, 65], and the model needs floats of shape [4, 64]"),
        ({"lora_B": (4, 64)}, "shape [4, 64], and the model needs floats of shape [64, 4]"),
        ({"lora_B": (64, 4, 1)}, "shape [64, 4, 1]"),
    ],
)
def test_shapes(
    table: AdapterTable,
    directory: Path,
    changes: Mapping[str, tuple[int, ...]],
    message: str,
) -> None:
    tensors = {f"{QUERY}.{name}": torch.ones(shape) for name, shape in changes.items()}
    change(directory, lambda known: known.update(tensors))
    refused(table, directory, message)


def test_no_rank_at_all(table: AdapterTable, directory: Path) -> None:
    tensors = {f"{QUERY}.lora_A": torch.ones(0, 64), f"{QUERY}.lora_B": torch.ones(64, 0)}
    save_file(tensors, directory / "lora_weights.safetensors")
    configure(directory, {"lora_config": {"alpha": 8}})
    refused(table, directory, f"matrices of {QUERY} are of rank 0: it must be 1 to max_lora_rank=4")


def test_a_rank_that_the_config_does_not_have(table: AdapterTable, directory: Path) -> None:
    configure(directory, {"lora_config": {"r": 3, "alpha": 6}})
    refused(table, directory, "of shape [4, 64], and the model needs floats of shape [3, 64]")


def test_too_great_a_rank(table: AdapterTable, checkpoint: Path, tmp_path: Path) -> None:
    write_adapter(checkpoint, tmp_path, r=5)
    refused(table, tmp_path, "are of rank 5: it must be 1 to max_lora_rank=4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_values_that_are_not_finite(
    table: AdapterTable, directory: Path, matrix: str, value: float
) -> None:
    name = f"{QUERY}.{matrix}"
    change(directory, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(table, directory, f"matrices of {QUERY} are not finite")


def test_integers(table: AdapterTable, directory: Path) -> None:
    name = f"{QUERY}.lora_A"
    change(directory, lambda tensors: tensors.update({name: tensors[name].long()}))
    refused(table, directory, f"{name} is torch.int64")


def test_an_adapter_of_another_release(
    table: AdapterTable, speech_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    write_adapter(speech_checkpoint("v2", stop_bias=-1.0), tmp_path)
    refused(table, tmp_path, "the model needs floats of shape")
