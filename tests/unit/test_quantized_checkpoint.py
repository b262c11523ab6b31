"""Checkpoints that other tools have quantized, held to what these say the matrices are.

compressed-tensors packs and unpacks with the package of that name, which also reads AWQ. GPTQ is
packed here by the description of its format; it was held once, by hand, to AutoGPTQ 0.7.1 (its
`pack` and its forward pass: equal), and AWQ to AutoAWQ 0.2.9.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.select import select_kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.layers.linear import Linear
from nanovllm.llm import LLM
from nanovllm.models.decoder import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.quantized_checkpoint import unpack
from nanovllm.models.weights import load_model, weight_source
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")
PLAIN = TorchKernels(CPU, torch.float32)

Tensors = dict[str, Tensor]


class Made(NamedTuple):
    """A matrix's tensors as a tool stores them, and the matrix that they stand for."""

    tensors: Tensors
    matrix: Tensor


class Grid(NamedTuple):
    """Codes `[rows, depth]`, and scales and zero points `[rows, num_groups]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int

    def matrix(self) -> Tensor:
        depth = self.codes.shape[1]
        zeros, scales = (
            values.repeat_interleave(self.group, dim=1)[:, :depth]
            for values in (self.zeros, self.scales)
        )
        return (self.codes - zeros) * scales


def round_to_grid(matrix: Tensor, bits: int, group: int, symmetric: bool) -> Grid:
    """Plain rounding; zero points that are not symmetric run from 1 to the last code."""
    rows, depth = matrix.shape
    group = depth if group == -1 else group
    num_groups = -(-depth // group)
    last = (1 << bits) - 1
    padded = torch.nn.functional.pad(matrix, (0, num_groups * group - depth))
    groups = padded.view(rows, num_groups, group)
    if symmetric:
        scales = 2 * groups.abs().amax(-1) / last
        zeros = torch.full((rows, num_groups), (last + 1) // 2)
    else:
        scales = (groups.amax(-1) - groups.amin(-1)) / last
        zeros = torch.arange(rows * num_groups).view(rows, num_groups) % last + 1
    scales = scales.half().float()
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, last)
    return Grid(codes.view(rows, -1)[:, :depth].int(), scales, zeros.int(), group)


def pack(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack along the last dimension, the first value in the lowest bits, or as `order` has it."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % per_word))
    words = values.view(len(values), -1, per_word)
    if order is not None:
        words = words[..., order]
    packed = (words << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def gptq(
    matrix: Tensor,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
) -> Made:
    """As AutoGPTQ and GPTQModel: by inputs, and in version 1 with zero points less one."""
    grid = round_to_grid(matrix, bits, group, symmetric)
    stored_zeros = grid.zeros - 1 if version == 1 else grid.zeros
    tensors = {
        "qweight": pack(grid.codes, bits).T.contiguous(),
        "qzeros": pack(stored_zeros.T, bits),
        "scales": grid.scales.T.half().contiguous(),
        "g_idx": (torch.arange(matrix.shape[1]) // grid.group).int(),
    }
    return Made(tensors, grid.matrix())


def awq(matrix: Tensor, group: int = 32) -> Made:
    """As AutoAWQ's GEMM version: by outputs, in its order of eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    grid = round_to_grid(matrix, 4, group, symmetric=False)
    tensors = {
        "qweight": pack(grid.codes.T, 4, order),
        "qzeros": pack(grid.zeros.T, 4, order),
        "scales": grid.scales.T.half().contiguous(),
    }
    return Made(tensors, grid.matrix())


def compressed(
    matrix: Tensor,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    packed: bool = True,
) -> Made:
    """As llm-compressor, with the package's own compressors there and back."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    tool = pytest.importorskip("compressed_tensors.quantization")
    args = tool.QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group,
    )
    scheme = tool.QuantizationScheme(targets=["Linear"], weights=args)
    groups = matrix.view(len(matrix), -1, group or matrix.shape[1])
    scales, zeros = tool.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    dense = {"weight": matrix, "weight_scale": scales, "weight_zero_point": zeros}
    name = "Packed" if packed else "Int"
    compressor = getattr(compressors, f"{name}QuantizationCompressor")
    tensors = compressor.compress(dense, scheme)
    again = compressor.decompress(dict(tensors), scheme)
    return Made({name: t.contiguous() for name, t in tensors.items()}, again["weight"])


def settings_of(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": 4, "group_size": 32} | more


def compressed_settings(form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Made]]] = {
    "gptq": (settings_of("gptq"), gptq),
    "gptq-v2": (
        settings_of("gptq", checkpoint_format="gptq_v2"),
        lambda w: gptq(w, version=2),
    ),
    "gptq-zeros": (settings_of("gptq", sym=False), lambda w: gptq(w, symmetric=False)),
    "gptq-v2-zeros": (
        settings_of("gptq", sym=False, checkpoint_format="gptq_v2"),
        lambda w: gptq(w, symmetric=False, version=2),
    ),
    "gptq-g64": (settings_of("gptq", group_size=64), lambda w: gptq(w, group=64)),
    "gptq-g128": (settings_of("gptq", group_size=128), lambda w: gptq(w, group=128)),
    "gptq-row": (settings_of("gptq", group_size=-1), lambda w: gptq(w, group=-1)),
    "gptq-row-zeros": (
        settings_of("gptq", group_size=-1, sym=False, desc_act=True),
        lambda w: gptq(w, group=-1, symmetric=False),
    ),
    "gptq-8bit-row": (
        settings_of("gptq", bits=8, group_size=-1),
        lambda w: gptq(w, bits=8, group=-1),
    ),
    "awq": (settings_of("awq", version="gemm", zero_point=True), awq),
    "awq-row": (settings_of("awq", group_size=-1), lambda w: awq(w, group=-1)),
    "compressed": (compressed_settings(), compressed),
    "compressed-zeros": (
        compressed_settings(symmetric=False),
        lambda w: compressed(w, symmetric=False),
    ),
    "compressed-row": (
        compressed_settings(group_size=None, strategy="channel"),
        lambda w: compressed(w, group=None),
    ),
    "compressed-int8": (
        compressed_settings("int-quantized", num_bits=8, group_size=None, strategy="channel"),
        lambda w: compressed(w, bits=8, group=None, packed=False),
    ),
    "compressed-4bit-bytes": (
        compressed_settings("int-quantized"),
        lambda w: compressed(w, packed=False),
    ),
    "compressed-4bit-bytes-row-zeros": (
        compressed_settings("int-quantized", symmetric=False, group_size=None, strategy="channel"),
        lambda w: compressed(w, group=None, symmetric=False, packed=False),
    ),
}
"""Checkpoints that are read as they are."""

ROUNDED: dict[str, tuple[dict[str, Any], Callable[[Tensor], Made]]] = {
    "gptq-8bit": (settings_of("gptq", bits=8), lambda w: gptq(w, bits=8)),
    "gptq-8bit-zeros": (
        settings_of("gptq", bits=8, group_size=-1, sym=False),
        lambda w: gptq(w, bits=8, group=-1, symmetric=False),
    ),
    "compressed-int8-zeros": (
        compressed_settings("int-quantized", num_bits=8, symmetric=False, group_size=None),
        lambda w: compressed(w, bits=8, group=None, symmetric=False, packed=False),
    ),
    "compressed-8bit-groups": (
        compressed_settings(num_bits=8),
        lambda w: compressed(w, bits=8),
    ),
}
"""Checkpoints whose 8 bits are rounded once more, to one scale a row."""

ALL = FORMATS | ROUNDED


@pytest.fixture
def make(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a quantized checkpoint, and the one that it stands for."""

    def write(
        name: str = "gptq",
        base: str = "qwen3",
        change: Callable[[Tensors], None] | None = None,
        matrices: tuple[str, ...] = ("_proj.weight",),
        **settings: Any,
    ) -> tuple[Path, Path]:
        stored_settings, quantize = ALL[name]
        paths = [
            Path(shutil.copytree(checkpoint(base), tmp_path / kind)) for kind in ("dense", "packed")
        ]
        dense = load_file(paths[0] / "model.safetensors")
        stored = dict(dense)
        for tensor_name in [n for n in dense if n.endswith(matrices)]:
            made = quantize(dense[tensor_name])
            del stored[tensor_name]
            module = tensor_name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": t for suffix, t in made.tensors.items()}
            dense[tensor_name] = made.matrix.contiguous()
        if change is not None:
            change(stored)
        save_file(dense, paths[0] / "model.safetensors")
        save_file(stored, paths[1] / "model.safetensors")
        config = json.loads((paths[1] / "config.json").read_text())
        config["quantization_config"] = stored_settings | settings
        (paths[1] / "config.json").write_text(json.dumps(config))
        return paths[0], paths[1]

    return write


def load(directory: Path, kernels: Kernels = PLAIN, **options: Any) -> CausalLM:
    source = weight_source(EngineConfig(**options), directory, torch.float32)
    config = ModelConfig.from_directory(directory)
    return load_model(config, source, kernels, dtype=torch.float32, device=CPU)


def edit_settings(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def linears(model: CausalLM) -> dict[str, Linear]:
    return {p: m for p, m in model.named_modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_are_what_their_tool_says(
    make: Callable[..., tuple[Path, Path]], name: str
) -> None:
    dense, packed = (linears(load(path)) for path in make(name))
    for path, module in dense.items():
        found, expected = packed[path].weight.weight, module.weight.weight
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=path)


@pytest.mark.parametrize("name", ROUNDED)
def test_eight_bits_in_groups_are_off_by_half_a_step_of_the_row(
    make: Callable[..., tuple[Path, Path]], name: str
) -> None:
    dense, packed = (linears(load(path)) for path in make(name))
    for path, module in dense.items():
        expected = module.weight.weight
        off = (packed[path].weight.weight - expected).abs()
        assert (off <= 0.501 * expected.abs().amax(1, keepdim=True) / 127).all(), path


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", ["qwen3-tied", "llama-bias"])
def test_our_kernels_multiply_by_them(
    make: Callable[..., tuple[Path, Path]], name: str, base: str
) -> None:
    """They round activations to int8, which costs half a percent or so."""
    kernels = select_kernels(EngineConfig(), CPU, torch.float32)
    dense_path, packed_path = make(name, base)
    dense, packed = linears(load(dense_path)), linears(load(packed_path, kernels))
    for path, module in dense.items():
        x = torch.randn(5, module.spec.depth, generator=torch.Generator().manual_seed(0))
        expected = PLAIN.linear(x, module.weight)
        off = kernels.linear(x, packed[path].weight) - expected
        assert float(off.norm() / expected.norm()) < 0.02, path


# The tool packs no zero points of eight rows.
@pytest.mark.parametrize("name", sorted({*ALL} - {"compressed-zeros"}))
def test_a_router_that_is_quantized_is_expanded(
    make: Callable[..., tuple[Path, Path]], name: str
) -> None:
    paths = make(name, "qwen3-moe", matrices=("_proj.weight", "mlp.gate.weight"))
    dense, packed = map(linears, map(load, paths))
    gates = [path for path in dense if path.endswith("mlp.gate")]
    assert gates
    for path in gates:
        expected, found = dense[path].weight.weight, packed[path].weight.weight
        off = (found - expected).abs()
        assert (off <= 0.501 * expected.abs().amax(1, keepdim=True) / 127).all(), path
        if name in FORMATS:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=path)


@pytest.mark.parametrize("base", ["qwen3", "qwen3-moe"])
def test_a_model_generates_from_them(make: Callable[..., tuple[Path, Path]], base: str) -> None:
    dense, packed = make("awq", base)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    texts = []
    for directory in (dense, packed):
        with LLM(str(directory), device="cpu", cpu_isa="torch") as llm:
            texts.append(llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]
    with LLM(str(packed), device="cpu", quantization="awq") as llm:
        assert llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids


def test_awq_is_what_compressed_tensors_makes_of_it() -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    tool = pytest.importorskip("compressed_tensors.quantization")
    made = awq(torch.randn(64, 96))
    converter = converters.AutoAWQConverter(group_size=32)
    tensors = converter.process({f"m.{name}": t for name, t in made.tensors.items()})
    args = tool.QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
    scheme = tool.QuantizationScheme(targets=["Linear"], weights=args)
    plain = {name.removeprefix("m."): t for name, t in tensors.items()}
    plain["weight_scale"] = plain["weight_scale"].float()
    again = compressors.PackedQuantizationCompressor.decompress(plain, scheme)
    torch.testing.assert_close(again["weight"], made.matrix, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_taken_apart_lowest_bits_first(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (3, 5 * 32 // bits))
    assert torch.equal(unpack(pack(values, bits), bits).flatten(1), values.to(torch.uint8))


def test_zero_points_of_zero_survive_version_1() -> None:
    """GPTQModel takes one off each packed word, which borrows from the next zero point."""
    zeros = torch.tensor([[0, 3, 0, 0, 15, 1, 0, 7]])
    stored = pack(zeros, 4) - 0x11111111
    assert torch.equal(unpack(stored + 0x11111111, 4).flatten(1), zeros.to(torch.uint8))


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed"])
def test_what_is_stored_as_it_is_stays_dense(
    make: Callable[..., tuple[Path, Path]], checkpoint: Callable[[str], Path], name: str
) -> None:
    """The head and the embedding, and what the user of the tool left out."""
    plain = load_file(checkpoint("qwen3") / "model.safetensors")
    kept = "model.layers.1.mlp.down_proj"

    def keep(stored: Tensors) -> None:
        for tensor in [t for t in stored if t.startswith(f"{kept}.")]:
            del stored[tensor]
        stored[f"{kept}.weight"] = plain[f"{kept}.weight"].clone()

    _, packed = make(name, change=keep, modules_to_not_convert=[kept], ignore=["lm_head", kept])
    modules = linears(load(packed))
    for path in (kept, "model.embed_tokens", "lm_head"):
        assert torch.equal(modules[path].weight.weight, plain[f"{path}.weight"])


def test_biases_of_zeros_and_scales_of_activations_are_left_alone(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    path = "model.layers.0.self_attn"

    def add(stored: Tensors) -> None:
        stored[f"{path}.o_proj.bias"] = torch.zeros(64)
        for name in ("o_proj.input_scale", "o_proj.output_scale", "q_scale", "k_zero_point"):
            stored[f"{path}.{name}"] = torch.ones(1)

    load(make(change=add)[1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"o_proj.bias": torch.ones(64)}, r"Unexpected parameters: \['.*o_proj.bias'\]"),
        ({"o_proj.scales": None}, r"Missing parameters: \['.*o_proj.scales'\]"),
        ({"o_proj.qweight": None}, r"Missing parameters: \['.*o_proj.weight'\]"),
        ({"o_proj.qweight": torch.zeros(16, 3).int()}, r"o_proj.qweight has shape \[16, 3\].*64\]"),
        ({"o_proj.qweight": torch.zeros(9, 64).int()}, r"shape \[9, 64\].*128 values in 4 or 8"),
        ({"o_proj.scales": torch.ones(4, 9).half()}, r"o_proj.scales has shape \[4, 9\].*64 outp"),
        ({"o_proj.scales": torch.ones(3, 64).half()}, r"3 groups for 128 columns"),
        ({"o_proj.qweight": torch.zeros(1024).int()}, r"o_proj.qweight has shape \[1024\]"),
        ({"o_proj.qzeros": torch.zeros(2, 8).int()}, r"o_proj.qzeros has shape \[2, 8\].*\[4, 8\]"),
        ({"o_proj.g_idx": torch.randperm(128).int() // 32}, r"g_idx orders the columns.*desc_act"),
    ],
)
def test_a_matrix_that_is_not_whole_is_refused_by_name(
    make: Callable[..., tuple[Path, Path]], edit: dict[str, Tensor | None], message: str
) -> None:
    def change(stored: Tensors) -> None:
        for suffix, tensor in edit.items():
            name = f"model.layers.0.self_attn.{suffix}"
            if tensor is None:
                del stored[name]
            else:
                stored[name] = tensor

    _, packed = make(change=change, sym=False)
    with pytest.raises(InvalidRequestError, match=message):
        load(packed)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("gptq", suffix) for suffix in ("qweight", "qzeros", "scales")),
        *(("awq", suffix) for suffix in ("qweight", "qzeros", "scales")),
        ("compressed-zeros", "weight_packed"),
        ("compressed-zeros", "weight_scale"),
        ("compressed-zeros", "weight_zero_point"),
        ("compressed-int8", "weight"),
        ("compressed-int8-zeros", "weight_zero_point"),
    ],
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda tensor: tensor.flatten(),
        lambda tensor: tensor[:-1],
        lambda tensor: tensor[:0],
        lambda tensor: tensor.flatten()[0],
        lambda tensor: tensor.repeat(1, 2),
        lambda tensor: tensor.float() if not tensor.is_floating_point() else tensor.int(),
        lambda tensor: tensor.to(torch.int16),
    ],
    ids=["flat", "short", "empty", "scalar", "wide", "other", "int16"],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused_by_name(
    make: Callable[..., tuple[Path, Path]],
    name: str,
    suffix: str,
    damage: Callable[[Tensor], Tensor],
) -> None:
    """Or the one beside it is, where these two do not fit each other."""
    path = "model.layers.0.self_attn.o_proj"

    def change(stored: Tensors) -> None:
        stored[f"{path}.{suffix}"] = damage(stored[f"{path}.{suffix}"]).clone()

    with pytest.raises(InvalidRequestError, match=rf"parameter {path}\.|{path}.* groups for"):
        load(make(name, change=change)[1])


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("awq", "qzeros", r"Missing parameters: \['.*o_proj.qzeros'\]"),
        ("compressed-zeros", "weight_zero_point", r"Missing.*o_proj.weight_zero_point'\]"),
        ("compressed-int8", "weight_scale", "o_proj.weight is int8 .*quantized.*its scales"),
    ],
)
def test_scales_and_zero_points_must_be_there(
    make: Callable[..., tuple[Path, Path]], name: str, suffix: str, message: str
) -> None:
    def change(stored: Tensors) -> None:
        del stored[f"model.layers.0.self_attn.o_proj.{suffix}"]

    with pytest.raises(InvalidRequestError, match=message):
        load(make(name, change=change)[1])


def test_bytes_that_are_more_than_their_four_bits(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    def change(stored: Tensors) -> None:
        stored["model.layers.0.self_attn.o_proj.weight"][0, 0] = 8

    with pytest.raises(InvalidRequestError, match=r"o_proj.*has values of more"):
        load(make("compressed-4bit-bytes", change=change)[1])


@pytest.mark.parametrize("name", ["gptq", "gptq-8bit-row", "compressed-int8"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e5])
def test_scales_that_no_kernel_can_hold_are_refused_by_name(
    make: Callable[..., tuple[Path, Path]], name: str, scale: float
) -> None:
    path = "model.layers.0.self_attn.o_proj"
    suffix = "weight_scale" if name == "compressed-int8" else "scales"

    def change(stored: Tensors) -> None:
        scales = stored[f"{path}.{suffix}"].float().clone()
        scales[0, 0] = scale
        stored[f"{path}.{suffix}"] = scales

    _, packed = make(name, change=change)
    if scale == 1e5 and name != "gptq":  # those of 8 bits are float32
        load(packed)
        return
    with pytest.raises(InvalidRequestError, match=f"a scale of {path} is NaN, infinite or beyond"):
        load(packed)


@pytest.mark.parametrize("groups", [0, -1])
def test_an_order_that_says_nothing_is_none(
    make: Callable[..., tuple[Path, Path]], groups: int
) -> None:
    def change(stored: Tensors) -> None:
        for name in [name for name in stored if name.endswith(".g_idx")]:
            stored[name] = torch.full_like(stored[name], groups)

    load(make(change=change)[1])


def test_groups_of_other_sizes_are_refused(make: Callable[..., tuple[Path, Path]]) -> None:
    def change(stored: Tensors) -> None:
        name = "model.layers.0.self_attn.o_proj"
        made = gptq(torch.randn(64, 128), group=16)
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
        del stored[f"{name}.g_idx"]

    with pytest.raises(UnsupportedModelError, match=r"groups of 16 columns.*multiples of 32"):
        load(make(change=change)[1])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (gptq(torch.randn(64, 64), bits=8, group=-1), r"q_proj.*in 4 bits.*k_proj.*in 8 bits"),
        (gptq(torch.randn(64, 64), group=64), r"groups of 32 .*k_proj.*groups of 128"),
        (None, r"q_proj.*in 4 bits.*k_proj.*not quantized.*same way"),
    ],
)
def test_parts_of_one_matrix_that_differ_are_refused(
    make: Callable[..., tuple[Path, Path]], made: Made | None, message: str
) -> None:
    def change(stored: Tensors) -> None:
        name = "model.layers.0.self_attn.k_proj"
        for tensor in [t for t in stored if t.startswith(f"{name}.")]:
            del stored[tensor]
        tensors = {"weight": torch.zeros(64, 64)} if made is None else made.tensors
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    with pytest.raises(InvalidRequestError, match=message):
        load(make(change=change)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of("gptq", bits=3), "GPTQ in 3 bits.*4, 8"),
        (settings_of("gptq", checkpoint_format="marlin"), "format 'marlin'.*gptq, gptq_v2"),
        (settings_of("awq", version="gemv"), "version 'gemv'.*gemm"),
        (settings_of("awq", bits=8), "AWQ in 8 bits.*supported: 4$"),
        (compressed_settings("float-quantized", type="float", num_bits=8), r"float8.*integers"),
        (compressed_settings("nvfp4-pack-quantized", type="float"), "nvfp4-pack-quantized"),
        (compressed_settings(num_bits=3), "compressed-tensors in 3 bits"),
        (compressed_settings() | {"sparsity_config": {"format": "sparse-24"}}, "sparsity"),
        (compressed_settings() | {"transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
        *(
            ({"quant_method": method}, f"quantized with '{method}'.*gptq, awq, compressed-tensors")
            for method in ("fp8", "bitsandbytes", "mxfp4", "hqq", "torchao")
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    make: Callable[..., tuple[Path, Path]], settings: dict[str, Any], message: str
) -> None:
    _, packed = make()
    edit_settings(packed, settings)
    with pytest.raises(UnsupportedModelError, match=message):
        load(packed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of("gptq", group_size="x"), "group_size must be a positive integer, not 'x'"),
        (settings_of("gptq", bits="4"), "bits must be a positive integer, not '4'"),
        (settings_of("awq", group_size=[128, 128]), r"group_size must be .*not \[128, 128\]"),
        (compressed_settings(group_size=[128, 128]), r"group_size must be .*not \[128, 128\]"),
        (compressed_settings() | {"config_groups": [1]}, "config_groups must be an object"),
        (compressed_settings() | {"config_groups": {"a": 3}}, "a must be an object, not 3"),
        (compressed_settings() | {"config_groups": {"a": {"weights": 3}}}, "weights must be an"),
        (compressed_settings() | {"sparsity_config": "x"}, "sparsity_config must be an object"),
    ],
)
def test_a_setting_that_is_not_what_it_must_be_is_named(
    make: Callable[..., tuple[Path, Path]], settings: dict[str, Any], message: str
) -> None:
    _, packed = make()
    edit_settings(packed, settings)
    with pytest.raises(InvalidRequestError, match=message):
        load(packed)


@pytest.mark.parametrize("groups", [None, {"a": None}])
def test_groups_without_settings_go_by_what_is_stored(
    make: Callable[..., tuple[Path, Path]], groups: dict[str, None] | None
) -> None:
    load(make("compressed", config_groups=groups)[1])


def test_the_option_must_agree_with_the_checkpoint(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    _, packed = make("awq")
    load(packed, quantization="awq")
    for other in ("gptq", "int4"):
        with pytest.raises(InvalidRequestError, match=f"with 'awq' already.*quantization='{other}"):
            load(packed, quantization=other)
    load(packed, dummy_weights=True, quantization="int4")
