"""The networks of VoxCPM against the reference package, step by step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanovllm.layers.attention import LocalAttention
from nanovllm.layers.linear import Linear
from nanovllm.models.decoder import SelfAttention, Traits
from nanovllm.models.voxcpm.cfm import time_grid
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.model import VoxCPM
from tests.cpu_kernels import kernels_for
from tests.voxcpm_checkpoint import KINDS
from tests.voxcpm_oracle import draw_noise, golden, load_reference
from tests.voxcpm_speaker import (
    AUDIO_START,
    REFERENCE_END,
    REFERENCE_START,
    Position,
    Speaker,
    assert_close,
    edit_config,
    first_patch,
)

NUM_PATCHES = 6
TEXT = "the weather, today"
MODES = ("zero-shot", "continuation", "reference", "reference and continuation")
CASES = [
    *((kind, mode, {}) for kind in KINDS for mode in MODES[:2]),
    *(("v2", mode, {}) for mode in MODES[2:]),
    ("v1", "continuation", {"use_mup": True, "long_ctx": True}),
    ("v2", "reference and continuation", {"use_mup": True, "long_ctx": True}),
]


def patches_of(reference: Any, num_patches: int, seed: int) -> Tensor:
    """What might be encoded speech, `[num_patches, P, D]`."""
    shape = num_patches, reference.patch_size, reference.feat_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(reference: Any, mode: str) -> tuple[list[Position], dict[str, Any] | None]:
    """A prompt in a mode, for us and for the reference."""
    cache: dict[str, Any] = {"mode": mode.replace("reference and", "ref").replace(" ", "_")}
    before: list[Position] = []
    after: list[Position] = []
    text = TEXT
    if "reference" in mode:
        cache["ref_audio_feat"] = patches_of(reference, 3, seed=1)
        before = [REFERENCE_START, *cache["ref_audio_feat"], REFERENCE_END]
    if "continuation" in mode:
        cache |= {"prompt_text": "hello world. ", "audio_feat": patches_of(reference, 5, seed=2)}
        text, after = cache["prompt_text"] + text, [*cache["audio_feat"]]
    tokens = reference.text_tokenizer(text)
    prompt = [*before, *tokens, AUDIO_START, *after]
    return prompt, None if mode == "zero-shot" else cache


def reference_fsq(reference: Any, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        quantized: Tensor = reference.fsq_layer(hidden)
    return quantized


@pytest.fixture(scope="session")
def never_stops(speech_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Checkpoints that speak for as long as one lets them."""

    def get(kind: str, **options: Any) -> Path:
        return speech_checkpoint(kind, stop_bias=-1.0, **options)

    return get


class TestParity:
    """Everything the reference computes, with its own patches fed back.

    What differs after a rounding of the quantization is then bounded to one step.
    """

    @pytest.mark.parametrize(("kind", "mode", "options"), CASES)
    @pytest.mark.parametrize("isa", ["torch", "best"])
    def test_every_step(
        self,
        never_stops: Callable[..., Path],
        kind: str,
        mode: str,
        options: dict[str, Any],
        isa: str,
    ) -> None:
        directory = never_stops(kind, **options)
        reference = load_reference(directory)
        prompt, cache = prompt_of(reference, mode)
        noises = draw_noise(reference, NUM_PATCHES)
        expected = golden(reference, TEXT, noises, cache=cache, max_len=NUM_PATCHES)
        kernels = None if isa == "torch" else kernels_for("auto", torch.float32)
        speaker = Speaker(directory, kernels)
        mu = record_conditions(speaker.model)

        patches = expected["patch"].transpose(1, 2)  # [N, P, D]
        hidden = speaker.run([(0, 0, prompt)])
        for step in range(NUM_PATCHES):
            # The last position of the prompt is not quantized where it is a token.
            lm = expected["base_lm"][step : step + 1]
            if step or "continuation" in mode:
                lm = reference_fsq(reference, lm)
            assert_close(hidden[0], lm, ("base", step))
            assert_close(hidden[1], expected["residual_lm"][step : step + 1], ("residual", step))
            assert_close(speaker.stop_logits(hidden), expected["stop_logits"][[step]], step)
            cond = expected["cond"][step].T
            patch = speaker.sample(hidden, cond[None], noises[step].transpose(1, 2))
            assert_close(mu.pop(), expected["mu"][step], ("mu", step))
            assert_close(patch[0], patches[step], ("patch", step))
            hidden = speaker.run([(0, len(prompt) + step, [patches[step]])])

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_whole_utterance(self, never_stops: Callable[..., Path], kind: str) -> None:
        directory = never_stops(kind)
        reference = load_reference(directory)
        prompt, _ = prompt_of(reference, "zero-shot")
        noises = draw_noise(reference, NUM_PATCHES)
        expected = golden(reference, TEXT, noises, max_len=NUM_PATCHES)
        speaker = Speaker(directory)

        patch, said = torch.zeros_like(noises[0].transpose(1, 2)), []
        hidden = speaker.run([(0, 0, prompt)])
        for step, noise in enumerate(noises):
            patch = speaker.sample(hidden, patch, noise.transpose(1, 2))
            said.append(patch)
            hidden = speaker.run([(0, len(prompt) + step, [patch[0]])])
        latents = torch.cat(said)
        assert_close(latents, expected["features"], "patches", bound=1e-4)
        vae = speaker.model.vae
        state, slots = vae.new_decoder_state(1), torch.zeros(1, dtype=torch.int64)
        audio = vae.decode(latents.flatten(0, 1)[None], state, slots)
        assert_close(audio[0], expected["waveform"], "waveform", bound=1e-4)

    @pytest.mark.parametrize(
        ("timesteps", "cfg_value"), [(4, 2.0), (10, 1.0), (30, 3.5), (60, 0.0)]
    )
    def test_settings_of_the_sampler(
        self, never_stops: Callable[..., Path], timesteps: int, cfg_value: float
    ) -> None:
        directory = never_stops("v2")
        reference = load_reference(directory)
        prompt, _ = prompt_of(reference, "zero-shot")
        noises = draw_noise(reference, 1)
        options = {"max_len": 1, "timesteps": timesteps, "cfg_value": cfg_value}
        expected = golden(reference, TEXT, noises, **options)
        speaker = Speaker(directory)
        hidden = speaker.run([(0, 0, prompt)])
        noise = noises[0].transpose(1, 2)
        patch = speaker.sample(hidden, torch.zeros_like(noise), noise, [cfg_value], timesteps)
        assert_close(patch, expected["patch"].transpose(1, 2), "patch")

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("v1", {"dit_mean_mode": True}),
            ("v2", {"dit_config": {"dit_mean_mode": True}}),
            ("v1", {"lm_config": {"no_rope": True}}),
            ("v2", {"lm_config": {"no_rope": True}, "residual_lm_no_rope": False}),
        ],
    )
    def test_what_no_release_has(
        self, never_stops: Callable[..., Path], tmp_path: Path, kind: str, changes: dict[str, Any]
    ) -> None:
        directory = Path(shutil.copytree(never_stops(kind), tmp_path / "model"))
        edit_config(directory, changes)
        reference = load_reference(directory)
        prompt, cache = prompt_of(reference, "continuation")
        noises = draw_noise(reference, 1)
        expected = golden(reference, TEXT, noises, cache=cache, max_len=1)
        speaker = Speaker(directory)
        hidden = speaker.run([(0, 0, prompt)])
        cond = expected["cond"][0].T
        patch = speaker.sample(hidden, cond[None], noises[0].transpose(1, 2))
        assert_close(patch, expected["patch"].transpose(1, 2), "patch")


def record_conditions(model: VoxCPM) -> list[Tensor]:
    """A list that grows by the condition of each patch, laid out as the reference has it."""
    conditions: list[Tensor] = []
    model.feat_decoder.register_forward_pre_hook(
        lambda module, args: conditions.append(args[1].flatten())
    )
    return conditions


class TestBatches:
    """Neighbours change nothing."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_sequences_together_as_alone(self, never_stops: Callable[..., Path], kind: str) -> None:
        speaker = Speaker(never_stops(kind))
        shape = speaker.model.config
        generator = torch.Generator().manual_seed(3)

        def noise(n: int) -> Tensor:
            return torch.randn(n, shape.patch_size, shape.feat_dim, generator=generator)

        prompts: list[list[Position]] = [
            [5, 6, 7, AUDIO_START],
            [9, 8, AUDIO_START, *noise(4)],
            [REFERENCE_START, *noise(2), REFERENCE_END, 11, 12, 13, AUDIO_START],
        ]
        cfg, latents = [2.0, 1.0, 3.0], noise(3)
        hidden = speaker.run([(i, 0, prompt) for i, prompt in enumerate(prompts)])
        cond = noise(3)
        together = speaker.sample(hidden, cond, latents, cfg)
        rows: list[tuple[int, int, list[Position]]] = [
            (0, 4, [together[0]]),
            (1, 7, [together[1]]),
            (2, 8, [14, AUDIO_START]),
        ]
        after = speaker.run(rows)
        for i, prompt in enumerate(prompts):
            alone = speaker.run([(3, 0, prompt)])
            patch = speaker.sample(alone, cond[i : i + 1], latents[i : i + 1], [cfg[i]])
            assert_close(patch[0], together[i], ("patch", i))
            alone = speaker.run([(3, *rows[i][1:])])
            for name, one, all_ in zip(("base", "residual"), alone, after, strict=True):
                assert_close(one[0], all_[i], (name, i))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_prompt_in_pieces(self, never_stops: Callable[..., Path], kind: str) -> None:
        speaker = Speaker(never_stops(kind))
        shape = speaker.model.config
        patches = torch.randn(4, shape.patch_size, shape.feat_dim)
        prompt: list[Position] = [5, 6, 7, *patches[:2], 8, AUDIO_START, *patches[2:]]
        whole = speaker.run([(0, 0, prompt)])
        for first, last in ((0, 2), (2, 4), (4, 5), (5, 9)):
            pieces = speaker.run([(1, first, prompt[first:last])])
        assert_close(pieces[0], whole[0], "base")
        assert_close(pieces[1], whole[1], "residual")

    def test_unguided_rows_have_no_second_half(self, never_stops: Callable[..., Path]) -> None:
        speaker = Speaker(never_stops("v1"))
        shape = speaker.model.config
        num_rows: list[int] = []
        speaker.model.feat_decoder.estimator.register_forward_pre_hook(
            lambda module, args: num_rows.append(len(args[1]))
        )
        hidden = torch.randn(2, 3, shape.hidden_size)
        noise = torch.randn(3, shape.patch_size, shape.feat_dim)
        for cfg, expected in (([1.0] * 3, 3), ([1.0, 2.0, 1.0], 4), ([2.0, 1.5, 0.0], 6)):
            num_rows.clear()
            speaker.sample((hidden[0], hidden[1]), noise, noise, cfg, timesteps=3)
            assert num_rows == [expected] * 2


class TestPrecision:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bfloat16_is_near_float32(
        self, speech_checkpoint: Callable[..., Path], kind: str
    ) -> None:
        directory = speech_checkpoint(kind)
        exact = first_patch(Speaker(directory))
        for kernels in (None, kernels_for("auto", torch.bfloat16)):
            rounded = first_patch(Speaker(directory, kernels, torch.bfloat16))
            assert rounded.dtype == torch.float32
            assert_close(rounded, exact, kind, bound=0.12)

    @pytest.mark.parametrize("name", ["int8", "int4"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_quantized_is_near_float32(
        self,
        speech_checkpoint: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        kind: str,
        name: str,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        directory = speech_checkpoint(kind)
        speaker = Speaker(directory, kernels_for("auto", torch.float32), quantization=name)
        patch = first_patch(speaker)
        assert_close(patch, first_patch(Speaker(directory)), kind, 0.1 if name == "int8" else 0.6)

    def test_what_is_quantized(
        self,
        speech_checkpoint: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        speaker = Speaker(speech_checkpoint("v2"), quantization="int8")
        exact = {
            path
            for path, module in speaker.model.named_modules()
            if isinstance(module, Linear) and module.exact
        }
        quantized = {
            path
            for path, module in speaker.model.named_modules()
            if isinstance(module, Linear) and not module.exact
        }
        assert all(".layers." in path or path == "base_lm.embed_tokens" for path in quantized)
        assert {"fsq_layer.in_proj", "stop_head", "feat_decoder.estimator.out_proj"} <= exact
        stored = load_file(speech_checkpoint("v2") / "model.safetensors")
        kept = speaker.model.fsq_layer.in_proj.weight.weight
        assert torch.equal(kept, stored["fsq_layer.in_proj.weight"])


class TestTimeGrid:
    """The times of the reference at ten and four steps; see `solve_euler` there."""

    def test_times(self) -> None:
        grid = time_grid(10, torch.float32)
        expected = [0.95643, 0.90902, 0.85399, 0.78779, 0.70711, 0.60902, 0.49101, 0.35106, 0.18769]
        assert grid.times.tolist() == pytest.approx(expected, abs=1e-5)
        assert time_grid(4, torch.float32).times.tolist() == pytest.approx(
            [0.88268, 0.70711, 0.42388], abs=1e-5
        )
        coarse = time_grid(10, torch.bfloat16).times.tolist()
        assert coarse[:4] == pytest.approx([0.95312, 0.91016, 0.85156, 0.78906], abs=1e-5)

    def test_num_evaluations(self) -> None:
        for steps, expected in ((1, 0), (2, 1), (10, 9), (48, 47), (49, 47), (100, 96)):
            assert len(time_grid(steps, torch.float32).times) == expected, steps


def test_local_attention_norms_no_heads(speech_checkpoint: Callable[..., Path]) -> None:
    class Normed(Traits):
        qk_norm = True

    config = VoxCPMConfig.from_directory(speech_checkpoint("v1")).encoder
    attention = LocalAttention(2, config.num_heads, config.num_kv_heads)
    with pytest.raises(ValueError, match="norm no heads"):
        SelfAttention(config, attention, Normed)
