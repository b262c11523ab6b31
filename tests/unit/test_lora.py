"""LoRA adapters of speech, against the reference's own and against each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanovllm import SamplingParams
from nanovllm.batch import Key, SpeechPayload, SpeechRequest, patch_key
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.lora import NO_ADAPTER
from nanovllm.layers.linear import PackedLinear
from nanovllm.layers.lora import LoRATable
from nanovllm.models.adapters import AdapterTable
from nanovllm.worker.loading import LoadedEngine
from tests.lora_oracle import (
    ATTENTION,
    EVERYWHERE,
    adapters_of,
    load_adapted,
    load_small,
    speech_runner,
    write_adapter,
)
from tests.voxcpm_oracle import draw_noise, golden

NUM_PATCHES = 4

MakeCheckpoint = Callable[..., Path]


class Spoken(NamedTuple):
    """A request: what to say, and how."""

    keys: tuple[Key, ...]
    adapter_id: int | None = None
    seed: int = 0
    latents: bytes = b""
    cfg_value: float = 2.0
    timesteps: int = 10


def speak(loaded: LoadedEngine, *requests: Spoken, num_patches: int = NUM_PATCHES) -> list[Tensor]:
    """Patches of requests that run together, each `[num_patches, P * D]`."""
    engine = loaded.engine
    index_of = {}
    for index, spoken in enumerate(requests):
        (seq_id,) = engine.add(
            list(spoken.keys),
            SamplingParams(max_tokens=num_patches, seed=spoken.seed),
            adapter_id=spoken.adapter_id,
            payload=SpeechRequest(spoken.latents, spoken.cfg_value, spoken.timesteps, 1.0, 100),
        )
        index_of[seq_id] = index
    patches: list[list[Tensor]] = [[] for _ in requests]
    while engine.has_unfinished:
        for output in engine.step():
            assert output.finish_reason != "error", output
            assert isinstance(output.payload, SpeechPayload)
            latents = np.frombuffer(output.payload.latents, dtype=np.float32)
            patches[index_of[output.seq_id]].append(torch.from_numpy(latents.copy()))
    return [torch.stack(rows) for rows in patches]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def text_keys(*text: int) -> tuple[Key, ...]:
    return (*text, 101)


def recorded(seed: int, num_patches: int, patch_size: int) -> tuple[tuple[Key, ...], bytes]:
    """Keys and latents of a recording of noise; the tiny models have 16 features a frame."""
    values = torch.randn(num_patches, patch_size, 16, generator=torch.Generator().manual_seed(seed))
    patches = [patch.numpy().tobytes() for patch in values]
    return tuple(patch_key(patch) for patch in patches), b"".join(patches)


@pytest.fixture(scope="module")
def checkpoint(speech_checkpoint: MakeCheckpoint) -> Path:
    """A tiny VoxCPM 1 that never stops by itself."""
    return speech_checkpoint("v1", stop_bias=-1.0)


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of different ranks and places."""
    directory = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(checkpoint, directory / "attention", seed=1),
        write_adapter(checkpoint, directory / "everywhere", seed=2, r=8, **EVERYWHERE),
        write_adapter(checkpoint, directory / "lm", seed=3, r=1, enable_dit=False),
    ]


LoadWith = Callable[..., LoadedEngine]


@pytest.fixture
def load(checkpoint: Path, adapters: list[Path]) -> LoadWith:
    """Load an engine that takes adapters everywhere and has all of them, by their index."""
    everywhere = {f"lora_{name}": value for name, value in EVERYWHERE.items()}

    def load(**options: Any) -> LoadedEngine:
        loaded = load_small(checkpoint, **everywhere | options)
        for adapter_id, directory in enumerate(adapters):
            adapters_of(loaded).load(adapter_id, directory)
        return loaded

    return load


@pytest.mark.parametrize("cpu_isa", ["auto", "torch"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("v1", {}), ("v1.5", {"enable_dit": False}), ("v2", {"enable_lm": False}), ("v2", EVERYWHERE)],
)
def test_patches_are_those_of_the_reference_with_the_adapter(
    speech_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    cpu_isa: str,
) -> None:
    checkpoint = speech_checkpoint(kind, stop_bias=-1.0, use_mup=True)
    adapter = write_adapter(checkpoint, tmp_path, **settings)
    reference = load_adapted(checkpoint, adapter)
    noises = draw_noise(reference, NUM_PATCHES)
    expected = golden(reference, "the world", noises, max_len=NUM_PATCHES)["patch"]
    options = {f"lora_{name}": value for name, value in settings.items()}
    loaded = load_small(checkpoint, cpu_isa=cpu_isa, **options)
    speech_runner(loaded).noise_source = lambda seed, index: noises[index][0].T.contiguous()
    names = adapters_of(loaded).load(1, adapter)
    assert names == sorted(load_file(adapter / "lora_weights.safetensors"))
    keys = text_keys(*reference.text_tokenizer("the world"))
    plain, adapted = (
        speak(loaded, Spoken(keys, adapter_id))[0].view(NUM_PATCHES, *expected.shape[:0:-1])
        for adapter_id in (None, 1)
    )
    expected = expected.transpose(1, 2)
    assert error(adapted, expected) < 1e-4
    assert error(plain, expected) > 0.1


def test_adapters_in_one_batch_do_as_they_do_alone(load: LoadWith) -> None:
    """With prompts of all kinds, in chunks, with different guidance and timesteps."""
    speech, latents = recorded(5, 3, patch_size=2)
    requests = [
        Spoken(text_keys(*range(5, 40)), 0, 1),
        Spoken((*text_keys(7, 8, 9), *speech), 1, 2, latents, 1.0),
        Spoken(text_keys(5, 6), None, 3, timesteps=4),
        Spoken((*text_keys(9, 8), *speech), 2, 4, latents, timesteps=4),
        Spoken((*text_keys(9, 8), *speech), None, 4, latents),
        Spoken(text_keys(*range(5, 40)), 1, 6, cfg_value=3.0),
        Spoken(text_keys(5, 6), 0, 7, cfg_value=1.0, timesteps=4),
    ]
    alone = [speak(load(), request)[0] for request in requests]
    together = speak(load(max_loras=3), *requests)
    for found, expected in zip(together, alone, strict=True):
        assert error(found, expected) < 1e-4
    assert error(alone[3], alone[4]) > 0.1


def test_more_adapters_than_slots_take_turns(load: LoadWith) -> None:
    requests = [Spoken(text_keys(5, 6, 7), adapter_id, 9) for adapter_id in (0, 1, 2, None, 1, 0)]
    expected = [speak(load(), request)[0] for request in requests[:4]]
    found = speak(load(max_loras=1), *requests)
    for patches, index in zip(found, (0, 1, 2, 3, 1, 0), strict=True):
        assert error(patches, expected[index]) < 1e-4


def test_a_preempted_sequence_goes_on_with_its_adapter(load: LoadWith) -> None:
    requests = [Spoken(text_keys(*range(5, 24)), adapter_id, 3) for adapter_id in (0, 1, 2)]
    plenty = [speak(load(max_loras=3), request, num_patches=16)[0] for request in requests]
    loaded = load(max_loras=2, num_kv_blocks=5, max_model_len=80)
    found = speak(loaded, *requests, num_patches=16)
    assert loaded.engine.stats().num_preemptions
    for patches, expected in zip(found, plenty, strict=True):
        assert error(patches, expected) < 1e-4


def test_cached_prefixes_belong_to_an_adapter(load: LoadWith) -> None:
    loaded = load(max_loras=2)
    keys = text_keys(*range(5, 40))
    patches = []
    for adapter_id, num_cached in ((None, 0), (0, 0), (1, 0), (None, 32), (0, 64), (1, 96)):
        patches += speak(loaded, Spoken(keys, adapter_id))
        assert loaded.engine.stats().num_cached_tokens == num_cached
    assert loaded.engine.stats().num_prompt_tokens == 6 * len(keys)
    for first, again in zip(patches[:3], patches[3:], strict=True):
        assert error(again, first) < 1e-4


def test_a_step_without_adapters_costs_nothing(
    load: LoadWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    calls = []

    def add(table: LoRATable, y: Tensor, *args: object) -> Tensor:
        calls.append(table)
        return y

    monkeypatch.setattr(LoRATable, "add", add)
    speak(loaded, Spoken(text_keys(5, 6, 7)))
    assert not calls
    speak(loaded, Spoken(text_keys(5, 6, 7), 0))
    assert calls


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_adapters_on_weights_of_fewer_bits(load: LoadWith, options: dict[str, Any]) -> None:
    keys = text_keys(5, 6, 7)
    exact, plain = (
        speak(load(), Spoken(keys, adapter_id), num_patches=1)[0] for adapter_id in (1, None)
    )
    loaded = load(**options)
    found = speak(loaded, Spoken(keys, 1), num_patches=1)[0]
    assert error(found, exact) < 0.5 * error(plain, exact)


class TestTable:
    """`AdapterTable`: ids, and who holds which slot."""

    @pytest.fixture
    def table(self, load: LoadWith) -> AdapterTable:
        return adapters_of(load(max_loras=2))

    def test_the_least_recently_used_adapter_gives_its_slot_up(self, table: AdapterTable) -> None:
        table.start(0, 0)
        table.start(1, 1)
        with pytest.raises(RuntimeError, match="all 2 adapter slots are in use"):
            table.start(2, 2)
        table.release(0)
        table.release(1)
        first, second = table.slot_of(0), table.slot_of(1)
        assert {first, second} == {0, 1}
        table.slot_of(0)
        assert table.slot_of(2) == second
        assert table.slot_of(0) == first

    def test_a_slot_in_use_is_kept(self, table: AdapterTable) -> None:
        table.start(0, 0)
        kept = table.slot_of(0)
        table.start(1, 1)
        table.release(1)
        table.start(1, 2)
        assert table.slot_of(0) == kept != table.slot_of(2)

    def test_rows_go_through_the_adapters_of_their_sequences(self, table: AdapterTable) -> None:
        table.start(3, 0)
        table.start(4, None)
        table.start(5, 0)
        rows = np.array([3, 4, 4, 5])
        batch, slots = table.batch(rows), table.slots_of(rows)
        assert batch is not None
        assert slots is not None
        slot = table.slot_of(0)
        assert slots.tolist() == [slot, NO_ADAPTER, NO_ADAPTER, slot]
        assert len(batch) == len(slots)
        assert table.batch(np.array([4, 6])) is None
        table.start(3, None)
        table.release(5)
        assert table.batch(np.array([3, 4, 5])) is None
        table.release(7)  # it never started

    def test_ids_are_never_used_again(self, table: AdapterTable, adapters: list[Path]) -> None:
        table.unload(1)
        assert 1 not in table
        table.unload(1)
        table.unload(99)
        for adapter_id in (0, 1):
            with pytest.raises(InvalidRequestError, match=f"id {adapter_id} has been used before"):
                table.load(adapter_id, adapters[0])
        with pytest.raises(InvalidRequestError, match="the adapter with id 1 is not loaded"):
            table.start(0, 1)
        table.load(3, adapters[1])
        assert 3 in table

    def test_an_id_may_be_used_after_a_failure(
        self, table: AdapterTable, adapters: list[Path], tmp_path: Path
    ) -> None:
        with pytest.raises(InvalidRequestError):
            table.load(3, tmp_path / "missing")
        table.load(3, adapters[0])

    def test_an_unloaded_adapter_leaves_its_slot(self, table: AdapterTable) -> None:
        table.start(0, 0)
        table.start(1, 1)
        table.unload(0)  # its sequence has ended, but no step has released it yet
        assert table.batch(np.array([0])) is None
        table.start(2, 2)
        assert table.slot_of(1) != table.slot_of(2)


def test_an_engine_without_adapters_refuses_them(checkpoint: Path) -> None:
    loaded = load_small(checkpoint, enable_lora=False)
    assert speech_runner(loaded).adapters is None
    with pytest.raises(InvalidRequestError, match="started without LoRA adapters"):
        loaded.engine.add([5, 101], SamplingParams(), adapter_id=1, payload=SpeechRequest())


def test_attention_alone_leaves_the_gates_fused(checkpoint: Path) -> None:
    model = speech_runner(load_small(checkpoint)).model
    packed = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed["base_lm.layers.0.mlp.gate_up_proj"].spec.gated
    attention = packed["base_lm.layers.0.self_attn.qkv_proj"]
    assert attention.lora is not None
    assert list(attention.lora.parts) == [
        f"base_lm.layers.0.self_attn.{name}" for name in ATTENTION[:3]
    ]
    encoder = packed["feat_encoder.encoder.layers.0.self_attn.qkv_proj"]
    assert encoder.lora is None
