"""Checkpoints that are read, and those that are refused with a reason."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding, inverse_frequencies
from nanovllm.models.architectures import ARCHITECTURES
from nanovllm.models.checkpoint import Checkpoint, WeightSource, weight_files
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.registry import CLASSES
from nanovllm.models.weights import RandomWeights, load_model

CPU = torch.device("cpu")
KERNELS = TorchKernels(CPU, torch.float32)


def load(
    directory: Path, source: WeightSource | None = None, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    config = ModelConfig.from_directory(directory)
    source = source or Checkpoint(weight_files(directory))
    return load_model(config, source, KERNELS, dtype=dtype, device=CPU)


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model holds, taken apart again into the tensors of its checkpoint."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            first = 0
            for part, rows in module.parts(path).items():
                tensors[f"{part}.weight"] = module.weight.weight[first : first + rows]
                if module.has_bias:
                    tensors[f"{part}.bias"] = module.weight.bias[first : first + rows]
                first += rows
    return tensors


@pytest.fixture
def directory(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Qwen3 that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_packed_parameters_hold_the_checkpoint_tensors(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    targets = stored_tensors(load(directory))
    assert targets.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(targets[name], tensor), name


def test_shards_are_read_by_their_index(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    targets = stored_tensors(load(directory))
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors.items())
    (directory / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are missing: \['b.safet"):
        load(directory)


def test_missing_and_unexpected_tensors_are_named(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"Unexpected parameters: \['extra'\]"):
        load(directory)
    gone = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.pop(gone))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"Missing parameters: \['{gone}'\]"):
        load(directory)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[3\].*makes it \[64\]"):
        load(directory)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64],
)
def test_weights_that_are_no_plain_floats_are_refused(directory: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(InvalidRequestError, match=f"{name} is {kind} .*quantization_config"):
        load(directory)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"x": 3}])
def test_an_index_that_names_no_files_is_refused(directory: Path, weight_map: object) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidRequestError, match=r"index.json: weight_map must be an object"):
        weight_files(directory)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qwen2", ("attention_bias", "mlp_bias")),
        ("mistral", ("attention_bias", "mlp_bias")),
        ("qwen3", ("mlp_bias",)),
    ],
)
def test_flags_that_an_architecture_does_not_have_are_ignored(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    directory = Path(shutil.copytree(checkpoint(name), tmp_path / "model"))
    edit_config(directory, **dict.fromkeys(flags, True))
    load(directory)


def test_a_corrupt_file_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
        load(directory)


def test_a_tied_head_and_old_buffers_may_stand_in_the_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(checkpoint("qwen3-tied"), tmp_path / "model"))
    edit_tensors(
        directory,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            }
        ),
    )
    load(directory)
    edit_tensors(
        directory,
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}),
    )
    load(directory)  # as near as it can be stored
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 2)}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false there, or remove lm_"):
        load(directory)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "model.onnx"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"{Path(name).suffix} weights.*supported: \*.safetensors"
    ):
        weight_files(tmp_path)


def test_no_weights_at_all_points_to_dummy_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dummy_weights"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="dummy_weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architectures"),
        ({"architectures": []}, "names no architectures"),
        (
            {"architectures": ["MambaForCausalLM"]},
            "Unsupported model architecture: MambaForCausalLM; supported: Gemma3.*Qwen3ForCausalLM",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantized with 'fp8'.*supported: float32",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'.*yarn, llama3"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json lacks 'factor'"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported; supported: bfloat16"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, not 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a positive number, not 'x'"),
        ({"rope_parameters": ["x"]}, "rope_parameters must be an object"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
            "factor must be a positive number, not 'x'",
        ),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            r"by the type of a layer \(full_attention, sliding_attention\) are not supported",
        ),
        (
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"]},
            "layer_types has 1 entries, and num_hidden_layers=3",
        ),
        (
            {"rope_scaling": {"full_attention": {}}},
            "by the type of a layer .*full_attention.* are not supported",
        ),
        ({"quantization_config": []}, r"quantization_config must be an object, not \[\]"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "Unsupported model architecture"),
        ({"eos_token_id": 1.5}, "eos_token_id must be an integer or a list of integers"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id must be an integer or a list of integers"),
        ({"num_hidden_layers": 10**20}, "supported: up to 4096"),
        ({"dtype": "int8", "rms_norm_eps": 0}, "dtype 'int8' is not supported"),
        ({"head_dim": 15}, "head_dim=15 is not supported: it must be even"),
    ],
)
def test_a_config_we_do_not_read_is_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*\*.safetensors"):
        ModelConfig.from_directory(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)


def test_norms_are_float32_whatever_the_others_are(directory: Path) -> None:
    """The kernels read them by their address."""
    model = load(directory, RandomWeights(0, torch.float32), torch.bfloat16)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert norms
    assert {norm.weight.dtype for norm in norms} == {torch.float32}


def test_dummy_weights_are_seeded(directory: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = load(directory, RandomWeights(seed, torch.float32))
        return torch.cat([tensor.flatten() for tensor in stored_tensors(model).values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert weights(1).isfinite().all()


@pytest.mark.parametrize("shape", [(3000, 1024), (1025, 2048), (5, 3)])
def test_large_dummy_matrices_are_uniform_and_of_full_rank(shape: tuple[int, int]) -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    weights = RandomWeights(0, torch.float32)
    weights.check(dict.fromkeys(names, shape))
    matrix, other = (weights.tensor(name) for name in names)
    assert matrix.shape == shape
    assert not torch.equal(matrix, other)
    assert len({tuple(row) for row in matrix.tolist()}) == len(matrix)
    limit = (3 / shape[1]) ** 0.5
    assert matrix.abs().max() <= limit
    if shape[0] > 5:
        assert matrix.std().item() == pytest.approx(shape[1] ** -0.5, rel=0.01)
        singular = torch.linalg.svdvals(matrix)
        assert singular[-1] > 1e-3 * singular[0]


def test_every_architecture_we_promise_has_its_class() -> None:
    assert list(CLASSES) == list(ARCHITECTURES)


@pytest.mark.parametrize(
    "raw",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12},
        {"architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
        {"architectures": ["Qwen3NextForCausalLM"], "partial_rotary_factor": 0.25},
    ],
)
def test_an_unknown_architecture_is_refused_before_its_fields_are_read(
    raw: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=f"architecture: {raw['architectures'][0]}; supported: G"):
        ModelConfig.from_dict(raw)


BARE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
MIXED = BARE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("hidden_size", {"hidden_size": None}),
        ("num_attention_heads", {"num_attention_heads": None}),
        ("rms_norm_eps", {"rms_norm_eps": None}),
        ("max_position_embeddings", {"max_position_embeddings": None}),
        ("factor", {"rope_scaling": {"type": "linear", "factor": None}}),
        (
            "max_window_layers",
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4}
            | {"use_sliding_window": True, "max_window_layers": None},
        ),
    ],
)
def test_a_field_that_is_null_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be a positive .*not None"):
        ModelConfig.from_dict(BARE | changes)


def test_the_architecture_decides_and_not_the_type_of_the_model() -> None:
    mistral = BARE | {"architectures": ["MistralForCausalLM"], "sliding_window": 4}
    assert ModelConfig.from_dict(mistral).windows == (4, 4)
    assert ModelConfig.from_dict(BARE | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    assert ModelConfig.from_dict(BARE | {"model_type": "qwen3"}).head_dim == 4


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"mlp_only_layers": [0, 4]}, {1, 2, 3, 5}),
        ({"decoder_sparse_step": 2}, {1, 3, 5}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1, 5}),
        ({"num_experts": None, "num_local_experts": 4, "mlp_only_layers": [1, 2, 3]}, {0, 4, 5}),
    ],
)
def test_layers_with_experts(changes: dict[str, Any], layers: set[int]) -> None:
    raw = {name: value for name, value in (MIXED | changes).items() if value is not None}
    mixture = ModelConfig.from_dict(raw).mixture
    assert mixture is not None
    assert mixture.layers == layers
    assert (mixture.num_experts, mixture.norm_topk_prob) == (4, False)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 0}, {"decoder_sparse_step": 7}, {"mlp_only_layers": [*range(6)]}]
)
def test_a_mixture_of_no_layer_is_none(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(MIXED | changes).mixture is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of indices"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers must be a list of indices"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of indices"),
        ({"moe_intermediate_size": None}, "lacks 'moe_intermediate_size'"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok must be a positive integer"),
        ({"num_experts": 10**7}, "num_experts=10000000 is not supported"),
    ],
)
def test_mixtures_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ModelConfig.from_dict(MIXED | changes)


def test_null_is_left_out_of_a_mixture() -> None:
    nulls = dict.fromkeys(("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"))
    raw = MIXED | nulls | {"num_experts": None, "num_local_experts": 4}
    assert ModelConfig.from_dict(raw).mixture == ModelConfig.from_dict(MIXED).mixture


def test_a_window_that_is_left_out_is_transformers() -> None:
    mistral = BARE | {"architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_dict(mistral).windows == (4096, 4096)
    assert ModelConfig.from_dict(mistral | {"sliding_window": None}).windows == (None, None)


def test_a_token_goes_through_no_more_experts_than_there_are() -> None:
    with pytest.raises(InvalidRequestError, match="num_experts_per_tok=5 is more than"):
        ModelConfig.from_dict(MIXED | {"num_experts_per_tok": 5})


def test_experts_have_one_window() -> None:
    raw = MIXED | {"sliding_window": 4, "max_window_layers": 3}
    assert ModelConfig.from_dict(raw).windows == (None,) * 6
    raw |= {"use_sliding_window": True}
    assert ModelConfig.from_dict(raw).windows == (4,) * 6
    assert ModelConfig.from_dict(raw | {"layer_types": ["full_attention"] * 6}).windows == (4,) * 6


@pytest.mark.parametrize(("first", "windows"), [(0, (4, 4)), (1, (None, 4)), (2, (None, None))])
def test_windows_begin_at_a_layer(first: int, windows: tuple[int | None, ...]) -> None:
    raw = BARE | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4}
    raw |= {"use_sliding_window": True, "max_window_layers": first}
    assert ModelConfig.from_dict(raw).windows == windows


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [("Mistral", (4, None)), ("Qwen2", (4, None)), ("Llama", (None, None))],
)
def test_windows_by_the_types_of_layers(architecture: str, windows: tuple[int | None, ...]) -> None:
    """As transformers has it: Mistral by `AutoModel`, and Llama without any."""
    raw = BARE | {"architectures": [f"{architecture}ForCausalLM"], "sliding_window": 4}
    raw |= {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    assert ModelConfig.from_dict(raw).windows == windows


YARN = {"rope_type": "yarn", "factor": 2}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (YARN | {"beta_fast": "x"}, "beta_fast must be a positive number, not 'x'"),
        (YARN | {"beta_fast": -1}, "beta_fast must be a positive number, not -1"),
        (YARN | {"beta_fast": 1e308}, r"beta_fast=1e\+308 is not supported; supported: 1e-09 to"),
        (YARN | {"beta_slow": [1]}, "beta_slow must be a positive number"),
        (YARN | {"beta_slow": 5e-324}, "beta_slow=5e-324 is not supported"),
        (YARN | {"mscale": "x", "mscale_all_dim": 1}, "mscale must be a positive number"),
        (YARN | {"mscale": 1, "mscale_all_dim": -1}, "mscale_all_dim must be a positive number"),
        (YARN | {"attention_factor": "x"}, "attention_factor must be a finite number, not 'x'"),
        (YARN | {"attention_factor": []}, "attention_factor must be a finite number"),
        (YARN | {"attention_factor": math.nan}, "attention_factor must be a finite number"),
        (YARN | {"attention_factor": -1e308}, "attention_factor=-1e.308 is not supported"),
        (YARN | {"truncate": "false"}, "truncate must be true or false, not 'false'"),
        (YARN | {"rope_theta": 1.0}, "rope_theta=1.0 is not supported; supported: above 1"),
        (YARN | {"factor": 1e308}, r"factor=1e\+308 is not supported"),
        (YARN | {"factor": 10**400}, "factor must be a positive number"),
        (YARN | {"original_max_position_embeddings": 1e300}, "original_.*=1e.300 is not supported"),
        (YARN | {"factor": 1e8}, "a context of 6400000000 positions .*supported: 1 to 1000000000"),
        ({"rope_type": "linear", "factor": 1e308}, r"factor=1e\+308 is not supported"),
        ({"rope_type": "linear", "factor": 1e-8}, "a context of 0 positions"),
        ({"rope_type": "dynamic", "factor": 1e20}, r"factor=1e\+20 is not supported"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1e308}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            r"low_freq_factor=1e\+308 is not supported",
        ),
    ],
)
def test_rope_scaling_that_cannot_be(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ModelConfig.from_dict(BARE | {"rope_scaling": scaling})


def test_positions_are_bounded() -> None:
    with pytest.raises(InvalidRequestError, match=r"max_position_embeddings=.* up to 1000000000"):
        ModelConfig.from_dict(BARE | {"max_position_embeddings": 10**400})


@pytest.mark.parametrize("value", [0, None])
def test_what_yarn_does_not_say_is_the_default(value: int | None) -> None:
    raw = BARE | {"rope_scaling": YARN}
    fields = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    silent = BARE | {"rope_scaling": YARN | dict.fromkeys(fields, value)}
    frequencies, magnitude = inverse_frequencies(ModelConfig.from_dict(raw).rope)
    ours, our_magnitude = inverse_frequencies(ModelConfig.from_dict(silent).rope)
    assert torch.equal(ours, frequencies)
    assert our_magnitude == magnitude


def test_dynamic_rope_is_finite_at_any_factor() -> None:
    """Within the original context it is no other than without scaling, not about the same."""
    scaling = {"rope_type": "dynamic", "factor": 1e7}
    configs = (ModelConfig.from_dict(raw) for raw in (BARE | {"rope_scaling": scaling}, BARE))
    cos, plain = (RotaryEmbedding(config.rope)(torch.arange(200))[0] for config in configs)
    assert cos.isfinite().all()
    assert torch.equal(cos[:64], plain[:64])


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 7e5}])
def test_rope_scaling_that_was_added_by_hand_counts(theta: dict[str, float]) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    saved = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    both = BARE | {"rope_parameters": saved, "rope_scaling": yarn | theta}
    alone = BARE | {"rope_theta": 5e5, "rope_scaling": yarn | theta}
    assert ModelConfig.from_dict(both) == ModelConfig.from_dict(alone)
    assert ModelConfig.from_dict(both).rope.theta == theta.get("rope_theta", 5e5)
    assert ModelConfig.from_dict(both).max_model_len == 128


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    base = BARE
    old = base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(old).max_model_len == 128


def test_end_of_text_ids_come_from_the_generation_config(directory: Path) -> None:
    edit_config(directory, eos_token_id=5)
    assert ModelConfig.from_directory(directory).eos_token_ids == (5,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert ModelConfig.from_directory(directory).eos_token_ids == (6, 7)
