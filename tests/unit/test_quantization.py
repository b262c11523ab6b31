"""Weights quantized at load: how far they move, that they are kept, and what a model loses."""

import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.bench.quality import (
    QualityResult,
    quality_options,
    reference_config,
    run_quality,
)
from nanovllm.cli import bench
from nanovllm.config import QUANTIZATIONS, QUANTIZED_METHODS, EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.kernels import QuantizedWeight
from nanovllm.kernels.select import select_kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.layers.linear import Linear
from nanovllm.llm import LLM
from nanovllm.models import quantization, quantized_cache
from nanovllm.models.checkpoint import Checkpoint, weight_files
from nanovllm.models.decoder import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.quantization import SCHEMES, quantize
from nanovllm.models.quantized_cache import CachedSource
from nanovllm.models.weights import load_model, weight_source

CPU = torch.device("cpu")
CORPUS = Path(__file__).parents[2] / "scripts" / "data" / "fairytales.txt.xz"
INT4 = ["int4-g32", "int4-g64", "int4-g128"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the cache, out of the user's home."""
    directory = tmp_path / "cache"
    directory.mkdir()
    monkeypatch.setattr(quantized_cache, "private_cache", lambda _: directory)
    return directory


def normal(rows: int = 256, depth: int = 512) -> Tensor:
    return 0.02 * torch.randn(rows, depth, generator=torch.Generator().manual_seed(0))


def heavy_tailed(rows: int = 256, depth: int = 512) -> Tensor:
    """Student's t with three degrees of freedom: the tails of a layer with outliers."""
    torch.manual_seed(0)
    return 0.02 * torch.distributions.StudentT(3.0).sample((rows, depth))


def error(matrix: Tensor, rounded: Tensor) -> float:
    """The squared error, relative to the squares."""
    return float((rounded - matrix).square().sum() / matrix.square().sum())


def rounded_by_largest(matrix: Tensor, group: int) -> Tensor:
    """Plain rounding: the largest magnitude of a group goes to code 7."""
    groups = matrix.view(len(matrix), -1, group)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scales).round() * scales).flatten(1)


def test_schemes_and_methods_are_the_values_of_the_option() -> None:
    assert (*SCHEMES, *QUANTIZED_METHODS) == QUANTIZATIONS


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("matrix", [normal(), heavy_tailed()], ids=["normal", "heavy-tailed"])
def test_codes_and_scales_are_what_the_kernels_take(name: str, matrix: Tensor) -> None:
    scheme = SCHEMES[name]
    weight = quantize(matrix, scheme)
    group = scheme.group_size or matrix.shape[1]
    assert weight.codes.dtype == torch.uint8
    assert weight.codes.shape == matrix.shape
    assert int(weight.codes.max()) < 1 << scheme.bits
    assert weight.scales.shape == (len(matrix), matrix.shape[1] // group)
    assert (weight.zeros, weight.bits, weight.group_size) == (None, scheme.bits, group)
    if scheme.bits == 4:
        assert torch.equal(weight.scales.half().float(), weight.scales)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    matrix = heavy_tailed()
    weight = quantize(matrix, SCHEMES["int8"])
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - matrix).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("name", INT4)
def test_int4_is_off_by_half_a_step_where_codes_reach(name: str) -> None:
    matrix = normal()
    weight = quantize(matrix, SCHEMES[name])
    steps = weight.scales.abs().repeat_interleave(weight.group_size, dim=1)
    off = (weight.dequantize() - matrix).abs()
    inside = (weight.codes > 0) & (weight.codes < 15)
    assert (off[inside] <= 0.5001 * steps[inside]).all()
    # The best of a few scales cuts off a value of a group, by little.
    assert (off <= 2.1 * steps).all()


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("matrix", [normal(), heavy_tailed()], ids=["normal", "heavy-tailed"])
def test_int4_errs_less_than_rounding_by_the_largest(name: str, matrix: Tensor) -> None:
    weight = quantize(matrix, SCHEMES[name])
    plain = rounded_by_largest(matrix, weight.group_size)
    assert error(matrix, weight.dequantize()) < 0.8 * error(matrix, plain)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name: str) -> None:
    matrix = normal(4, 256)
    matrix[1] = 0
    matrix[2, :128] = 0
    matrix[3] *= 1e-12
    values = quantize(matrix, SCHEMES[name]).dequantize()
    assert values.isfinite().all()
    assert (values[1] == 0).all()
    assert (values[2, :128] == 0).all()
    assert (values[3].abs() < 1e-12).all()
    assert torch.equal(quantize(torch.zeros(3, 64), SCHEMES[name]).dequantize(), torch.zeros(3, 64))


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("depth", [8, 33, 200])
def test_a_short_last_group_is_rounded_as_if_alone(name: str, depth: int) -> None:
    matrix, scheme = normal(5, depth), SCHEMES[name]
    weight = quantize(matrix, scheme)
    assert weight.codes.shape == (5, depth)
    first = (weight.scales.shape[1] - 1) * weight.group_size
    assert first < depth <= first + weight.group_size
    last = quantize(matrix[:, first:].contiguous(), scheme)
    assert torch.equal(weight.dequantize()[:, first:], last.dequantize())


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = heavy_tailed()
    whole = quantize(matrix, SCHEMES["int4"])
    monkeypatch.setattr(quantization, "CHUNK_ELEMENTS", 3000)
    assert torch.equal(quantize(matrix, SCHEMES["int4"]).dequantize(), whole.dequantize())


def test_bfloat16_and_quantized_matrices_are_rounded_by_their_values() -> None:
    matrix = normal().bfloat16()
    weight = quantize(matrix, SCHEMES["int4-g64"])
    assert torch.equal(
        weight.dequantize(), quantize(matrix.float(), SCHEMES["int4-g64"]).dequantize()
    )
    again = quantize(weight, SCHEMES["int8"])
    assert torch.equal(
        again.dequantize(), quantize(weight.dequantize(), SCHEMES["int8"]).dequantize()
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, value: float
) -> None:
    directory = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InvalidRequestError, match=r"layers.1.mlp.up_proj.weight cannot be quanti"):
        load(directory, name)


def load(directory: Path, name: str | None, **options: Any) -> CausalLM:
    """A model on torch's operators, which hold what quantized weights stand for."""
    config = EngineConfig(model=str(directory), quantization=name, **options)
    source = weight_source(config, directory, torch.float32)
    kernels = TorchKernels(CPU, torch.float32)
    model_config = ModelConfig.from_directory(directory)
    return load_model(model_config, source, kernels, dtype=torch.float32, device=CPU)


def weights(model: CausalLM) -> dict[str, Tensor]:
    return {
        path: module.weight.weight
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }


def is_same(one: CausalLM, other: CausalLM) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_matrix_is_quantized_and_nothing_else(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    directory = checkpoint("llama-bias")
    dense, model = load(directory, None), load(directory, name)
    for path, matrix in weights(model).items():
        expected = weights(dense)[path]
        assert 0 < error(expected, matrix) < (1e-4 if name == "int8" else 2e-2), path
    for (path, parameter), expected in zip(
        model.named_parameters(), dense.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), path


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernels_multiply_by_what_is_dequantized(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    """They round activations to int8, which costs half a percent or so."""
    directory = checkpoint("qwen3")
    config = EngineConfig(model=str(directory), quantization=name)
    kernels = select_kernels(config, CPU, torch.float32)
    model = load_model(
        ModelConfig.from_directory(directory),
        weight_source(config, directory, torch.float32),
        kernels,
        dtype=torch.float32,
        device=CPU,
    )
    plain = TorchKernels(CPU, torch.float32)
    others = dict(load(directory, name).named_modules())
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            x = torch.randn(7, module.spec.depth, generator=torch.Generator().manual_seed(1))
            expected = plain.linear(x, others[path].weight)
            found = kernels.linear(x, module.weight)
            assert float((found - expected).norm() / expected.norm()) < 0.02, path


class TestCache:
    """What is kept is what would come out again, for as long as the checkpoint is the same."""

    @pytest.fixture
    def directory(self, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))

    @pytest.fixture
    def num_quantized(self, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        """The matrices that were quantized so far."""
        seen: list[Tensor] = []

        def remember(matrix: Tensor, scheme: quantization.Scheme) -> QuantizedWeight:
            seen.append(matrix)
            return quantize(matrix, scheme)

        monkeypatch.setattr(quantization, "quantize", remember)
        return seen

    @pytest.mark.parametrize("name", SCHEMES)
    def test_the_second_load_quantizes_nothing(
        self, directory: Path, num_quantized: list[Tensor], cache: Path, name: str
    ) -> None:
        first = load(directory, name)
        count = len(num_quantized)
        assert count == 2 + 3 * 7  # each once
        assert is_same(load(directory, name), first)
        assert len(num_quantized) == count
        assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
        source = Checkpoint(weight_files(directory))
        for part in ("model.embed_tokens", "model.layers.0.mlp.down_proj"):
            expected = quantize(source.tensor(f"{part}.weight"), SCHEMES[name]).dequantize()
            assert torch.equal(weights(first)[part], expected)

    def test_a_copy_shares_the_file_and_a_change_does_not(
        self, directory: Path, tmp_path: Path, num_quantized: list[Tensor], cache: Path
    ) -> None:
        load(directory, "int4")
        count = len(num_quantized)
        load(Path(shutil.copytree(directory, tmp_path / "copy")), "int4")
        assert len(num_quantized) == count
        path = directory / "model.safetensors"
        stat, content = path.stat(), bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        load(directory, "int4")
        assert len(num_quantized) == 2 * count
        assert len(list(cache.iterdir())) == 2

    def test_schemes_and_versions_have_files_of_their_own(
        self, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("int8", "int4", "int4-g32", "int4-g64"):
            load(directory, name)
        assert len(list(cache.iterdir())) == 3
        monkeypatch.setattr(quantized_cache, "VERSION", -1)
        load(directory, "int8")
        assert len(list(cache.iterdir())) == 4

    @pytest.mark.parametrize("size", [0, 5, 1000])
    def test_a_broken_file_is_written_anew(
        self, directory: Path, cache: Path, caplog: pytest.LogCaptureFixture, size: int
    ) -> None:
        first = load(directory, "int4")
        (path,) = cache.iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        assert is_same(load(directory, "int4"), first)
        assert path.read_bytes() == whole
        assert "is broken and is written anew" in caplog.text

    def test_without_a_place_to_keep_them_they_are_quantized_each_time(
        self,
        directory: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        kept = load(directory, "int4-g64")
        monkeypatch.setattr(quantized_cache, "private_cache", lambda _: cache / "gone")
        assert is_same(load(directory, "int4-g64"), kept)
        assert "cannot be kept for the next start" in caplog.text

    def test_a_failure_leaves_no_file(self, directory: Path, cache: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"][7] = torch.nan
        save_file(tensors, path)
        with pytest.raises(InvalidRequestError, match="embed_tokens"):
            load(directory, "int8")
        assert not list(cache.iterdir())

    def test_random_weights_are_not_kept(self, directory: Path, cache: Path) -> None:
        source = weight_source(
            EngineConfig(dummy_weights=True, quantization="int4"), directory, torch.float32
        )
        assert not isinstance(source, CachedSource)
        load(directory, "int4", dummy_weights=True)
        assert not list(cache.iterdir())


def test_a_method_without_its_checkpoint_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidRequestError, match=r"'gptq' needs a checkpoint.*any.*int8, int4"):
        load(checkpoint("qwen3"), "gptq")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"one of int8, int4, .*awq.*got 'int3'"):
        EngineConfig(quantization="int3")


def held_out() -> str:
    """Some of what the demo model has not seen."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        return "\n\n".join(file.read().split("<|endoftext|>")[10::20][:3])


def quality_of(**options: Any) -> QualityResult:
    """A thousand tokens of the demo model's, read in windows of 250 and chunks of 100."""
    config = quality_options(
        EngineConfig(device="cpu", max_num_batched_tokens=100, **options), context=250
    )
    with LLM.from_config(config) as llm, LLM.from_config(reference_config(config)) as reference:
        return run_quality(llm, reference, held_out(), context=250, max_windows=4)


@pytest.mark.parametrize(
    ("options", "least_agreement", "most_divergence", "most_bits"),
    [
        # Measured on an AVX-512 processor: see docs/quantization.md; with some room.
        ({"quantization": "int8"}, 0.965, 0.002, 0.01),
        ({"quantization": "int4"}, 0.85, 0.04, 0.06),
        ({"quantization": "int4-g128"}, 0.83, 0.05, 0.08),
        ({"kv_cache_dtype": "int8"}, 0.97, 0.002, 0.01),
    ],
    ids=str,
)
def test_what_the_demo_model_loses_is_little(
    options: dict[str, str], least_agreement: float, most_divergence: float, most_bits: float
) -> None:
    result = quality_of(**options)
    assert (result.num_tokens, result.num_windows) == (4 * 249, 4)
    assert result.agreement > least_agreement
    assert 0 < result.kl_divergence < most_divergence
    assert abs(result.bits - result.reference_bits) < most_bits
    assert 4 < result.reference_bits < 7
    assert result.perplexity == pytest.approx(2**result.bits)


def test_losses_are_those_of_prompt_logprobs() -> None:
    from nanovllm import SamplingParams

    result = quality_of(quantization="int8")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with LLM(device="cpu", enable_prefix_caching=False, max_num_batched_tokens=100) as llm:
        token_ids = llm.encode(held_out())
        windows = [token_ids[i : i + 250] for i in range(0, 1000, 250)]
        nats = 0.0
        for window in windows:
            scores = llm.generate(window, params, use_tqdm=False)[0].prompt_logprobs or []
            nats -= sum(
                entry[token].logprob
                for token, entry in zip(window[1:], scores[1:], strict=True)
                if entry is not None
            )
    bits = nats / torch.tensor(2.0).log().item() / (4 * 249)
    assert result.reference_bits == pytest.approx(bits, abs=1e-4)


def test_comparing_a_model_with_itself_is_refused() -> None:
    for config in (EngineConfig(), EngineConfig(quantization="awq")):
        with pytest.raises(InvalidRequestError, match="nothing to compare"):
            reference_config(config)
    assert reference_config(config, "other").model == "other"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(held_out(), encoding="utf-8")
    return path


def test_bench_quality_as_json_and_as_a_table(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EngineConfig(device="cpu", quantization="int8")
    bench.quality(text_file, context=100, max_windows=2, json=True, engine=config)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_tokens"], shown["num_windows"]) == (198, 2)
    assert shown["settings"]["quantization"] == "int8"
    assert shown["reference"]["quantization"] is None
    assert shown["perplexity"] == pytest.approx(2 ** shown["bits"])
    bench.quality(text_file, context=100, max_windows=2, engine=config)
    table = capsys.readouterr().out
    assert "198 tokens in 2 windows" in table
    assert "same most likely token" in table
    assert "quantization=int8" in table


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("word " * 9, {"context": 1}, "context must be at least 2"),
        ("word " * 9, {"context": 4096}, "context must be at most 4095 for this model"),
        ("word " * 9, {"max_windows": 0}, "max_windows must be at least 1"),
        ("", {}, "less than two tokens"),
        (b"\xff\xfe\xff", {}, "is not UTF-8"),
    ],
)
def test_mistakes_of_bench_quality(
    tmp_path: Path, content: str | bytes, arguments: dict[str, Any], message: str
) -> None:
    path = tmp_path / "text"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidRequestError, match=message):
        bench.quality(path, engine=EngineConfig(device="cpu", quantization="int8"), **arguments)
