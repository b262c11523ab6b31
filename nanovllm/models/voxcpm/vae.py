"""AudioVAE: waveforms to latent frames and back, piece by piece and exactly as in one go.

The convolutional autoencoder of VoxCPM, after DAC (Kumar et al. 2023) but causal throughout and
depthwise. All of it is float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.errors import UnsupportedModelError
from nanovllm.kernels.audio import snake_table
from nanovllm.kernels.compiled import compile_rows
from nanovllm.kernels.kernels import Kernels
from nanovllm.models.voxcpm.config import AudioVAEConfig
from nanovllm.models.voxcpm.vae_layers import (
    DILATIONS,
    TAPS,
    Depthwise,
    Layer,
    ResidualUnit,
    Tensors,
    Waveform,
    convolution,
    transposed_convolution,
)

SLICE_FRAMES = 25
"""Latent frames that `AudioVAE.encode` makes at a time: a second in all releases."""
CACHED_BYTES = 2 << 20
"""On a CPU, sequences part ways where their signals are larger than this: all layers but the first
have few weights to share, and a signal that stays in the cache is worth 10 % at 8 streams of
VoxCPM1.5."""


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What the decoder remembers of the streams, by slot.

    Args:
        histories: Each layer's table, float32 `[num_slots, pad, channels]`.
    """

    histories: list[Tensor]


class AudioVAE:
    """The autoencoder of one checkpoint.

    Args:
        config: Its hyper-parameters.
        tensors: The checkpoint's tensors by name, see `expected_tensors`.
        kernels: Compute; of any dtype.
        device: Where tables and signals are.

    Raises:
        UnsupportedModelError: The convolutions are not depthwise.
    """

    def __init__(
        self,
        config: AudioVAEConfig,
        tensors: Mapping[str, Tensor],
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        if not config.depthwise:
            raise UnsupportedModelError(
                "audio_vae_config: only depthwise convolutions are supported", "depthwise"
            )
        self.config, self._device = config, device
        source = Tensors(tensors, kernels.with_dtype(torch.float32), device)
        with torch.inference_mode():
            self.encoder = _encoder_layers(config, source)
            self.decoder = _decoder_layers(config, source)
        self._run_decoder = _run

    def compile_decoder(self) -> None:
        """Have `torch.compile` fuse what is between the products, when it runs first."""
        self._run_decoder = compile_rows(_run_through)

    def new_decoder_state(self, num_slots: int) -> DecoderState:
        """Tables for so many streams, all silent."""
        return DecoderState(self._tables(self.decoder, num_slots))

    def reset(self, state: DecoderState, slots: Tensor) -> None:
        """Forget the streams in some slots, int64 `[n]`: the next ones there start from silence."""
        for history in state.histories:
            history.index_fill_(0, slots, 0.0)

    @torch.inference_mode()
    def decode(self, latents: Tensor, state: DecoderState, slots: Tensor) -> Tensor:
        """Continue some streams.

        Args:
            latents: Their next frames, `[num_seqs, num_frames, latent_dim]`.
            state: What was decoded of them before; is brought up to date.
            slots: Slot of each stream, int64 `[num_seqs]`, no two the same.

        Returns:
            float32 samples `[num_seqs, num_frames * decoder_hop]` in (-1, 1).
        """
        x = latents.to(self._device, torch.float32).contiguous()
        return self._run_decoder(self.decoder, x, state.histories, slots)

    @torch.inference_mode()
    def prime(self, latents: Tensor, state: DecoderState, slot: int) -> None:
        """Start a stream as if what comes before it had been decoded.

        Args:
            latents: What comes before, `[num_frames, latent_dim]`; the last `context_frames` do.
            state: The streams.
            slot: The stream.
        """
        slots = torch.full((1,), slot, device=self._device)  # a list would be waited for
        self.reset(state, slots)
        if len(latents):
            # Of any number of frames: not for what is compiled.
            x = latents[None, -context_frames(self.config) :].to(self._device, torch.float32)
            _run(self.decoder, x.contiguous(), state.histories, slots)

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        """Encode a recording.

        Args:
            audio: float32 mono samples at the config's `sample_rate`, a multiple of `hop`.

        Returns:
            Latent frames, float32 `[num_samples / hop, latent_dim]`.

        Raises:
            ValueError: The number of samples is not a multiple of `hop`.
        """
        if len(audio) % self.config.hop:
            raise ValueError(
                f"{len(audio)} samples are not a multiple of {self.config.hop}; pad them"
            )
        encoder = AudioEncoder(self)
        slices = torch.split(audio, SLICE_FRAMES * encoder.hop)
        return torch.cat([encoder.push(part) for part in slices])

    def _tables(self, layers: list[Layer], num_slots: int) -> list[Tensor]:
        return [torch.zeros(num_slots, *layer.history, device=self._device) for layer in layers]


class AudioEncoder:
    """One recording on its way through the encoder, in pieces of any length.

    Args:
        vae: Its encoder.
    """

    def __init__(self, vae: AudioVAE) -> None:
        self.hop = vae.config.hop
        self._layers, self._device = vae.encoder, vae._device
        self._latent_dim = vae.config.latent_dim
        self._histories = vae._tables(vae.encoder, 1)
        self._slots = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._rest = torch.empty(0, device=self._device)

    @torch.inference_mode()
    def push(self, samples: Tensor) -> Tensor:
        """Take the next samples, float32 `[n]`.

        Returns:
            The frames that are complete with them, float32 `[num_frames, latent_dim]`; what is
            left of the samples waits for the next.
        """
        samples = torch.cat([self._rest, samples.to(self._device, torch.float32)])
        ready = len(samples) // self.hop * self.hop
        self._rest = samples[ready:].clone()
        if not ready:
            return torch.empty(0, self._latent_dim, device=self._device)
        return _run(self._layers, samples[None, :ready, None], self._histories, self._slots)[0]


def context_frames(config: AudioVAEConfig) -> int:
    """Frames before it that a frame's sound depends on: 19, 21 and 20 in the three releases."""
    reach = TAPS - 1
    for stride in reversed(config.decoder_rates):
        reach += (TAPS - 1) * sum(DILATIONS)
        reach = -(-reach // stride) + 1
    return reach + TAPS - 1


def _run(layers: list[Layer], x: Tensor, histories: list[Tensor], slots: Tensor) -> Tensor:
    """Take some sequences, `[num_seqs, num_frames, channels]`, through the layers."""
    for index, (layer, history) in enumerate(zip(layers, histories, strict=True)):
        if x.device.type == "cpu" and x.nbytes > CACHED_BYTES and len(x) > 1:
            rest = layers[index:], histories[index:]
            halves = zip(x.chunk(2), slots.chunk(2), strict=True)
            return torch.cat([_run(rest[0], part, rest[1], of_part) for part, of_part in halves])
        x = layer(x, history, slots)
    return x


def _run_through(layers: list[Layer], x: Tensor, histories: list[Tensor], slots: Tensor) -> Tensor:
    """The same, all of them together."""
    for layer, history in zip(layers, histories, strict=True):
        x = layer(x, history, slots)
    return x


def _encoder_layers(config: AudioVAEConfig, tensors: Tensors) -> list[Layer]:
    layers: list[Layer] = [convolution(tensors, "encoder.block.0")]
    for index, stride in enumerate(config.encoder_rates, start=1):
        path = f"encoder.block.{index}.block"
        layers += [ResidualUnit(tensors, f"{path}.{i}", d) for i, d in enumerate(DILATIONS)]
        # Version 1 rounds odd strides up, so that its windows lag by a frame.
        pad = stride if config.is_v2 else stride + stride % 2
        snake = tensors.snake(f"{path}.3")
        layers.append(convolution(tensors, f"{path}.4", stride=stride, pad=pad, snake=snake))
    return [*layers, convolution(tensors, "encoder.fc_mu")]


def _decoder_layers(config: AudioVAEConfig, tensors: Tensors) -> list[Layer]:
    layers: list[Layer] = [
        Depthwise(tensors, "decoder.model.0"),
        convolution(tensors, "decoder.model.1"),
    ]
    for index, stride in enumerate(config.decoder_rates, start=2):
        path = f"decoder.model.{index}.block"
        snake = _conditioned_snake(config, tensors, index)
        layers.append(transposed_convolution(tensors, f"{path}.1", stride, snake))
        layers += [
            ResidualUnit(tensors, f"{path}.{i}", d) for i, d in enumerate(DILATIONS, start=2)
        ]
    last = len(config.decoder_rates) + 2
    return [*layers, Waveform(tensors, f"decoder.model.{last}", f"decoder.model.{last + 1}")]


def _conditioned_snake(config: AudioVAEConfig, tensors: Tensors, index: int) -> Tensor:
    """The Snake before an upsampling, after what its block does for the output rate."""
    alpha = tensors.get(f"decoder.model.{index}.block.0.alpha")
    if config.sr_bin_boundaries is None:
        return snake_table(alpha)
    bucket = sum(boundary < config.out_sample_rate for boundary in config.sr_bin_boundaries)
    path = f"decoder.sr_cond_model.{index}"
    scale, shift = (tensors.get(f"{path}.{name}_embed.weight") for name in ("scale", "bias"))
    return snake_table(alpha, scale[bucket], shift[bucket])


def expected_tensors(config: AudioVAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of the autoencoder has."""
    width = config.encoder_dim
    shapes = _conv_shapes("encoder.block.0", width, 1, TAPS)
    for index, stride in enumerate(config.encoder_rates, start=1):
        path = f"encoder.block.{index}.block"
        shapes |= _unit_shapes(path, 0, width)
        shapes[f"{path}.3.alpha"] = (1, width, 1)
        shapes |= _conv_shapes(f"{path}.4", 2 * width, width, 2 * stride)
        width *= 2
    for name in ("fc_mu", "fc_logvar"):  # the variance is for training
        shapes |= _conv_shapes(f"encoder.{name}", config.latent_dim, width, 3)
    return shapes | _decoder_shapes(config)


def _decoder_shapes(config: AudioVAEConfig) -> dict[str, tuple[int, ...]]:
    width, boundaries = config.decoder_dim, config.sr_bin_boundaries
    shapes = _conv_shapes("decoder.model.0", config.latent_dim, 1, TAPS)
    shapes |= _conv_shapes("decoder.model.1", width, config.latent_dim, 1)
    for index, stride in enumerate(config.decoder_rates, start=2):
        if boundaries is not None:
            for name in ("scale", "bias"):
                path = f"decoder.sr_cond_model.{index}.{name}_embed.weight"
                shapes[path] = (len(boundaries) + 1, width)
        path, half = f"decoder.model.{index}.block", config.decoder_dim // 2 ** (index - 1)
        shapes[f"{path}.0.alpha"] = (1, width, 1)
        shapes |= _conv_shapes(f"{path}.1", width, half, 2 * stride)
        shapes[f"{path}.1.bias"] = (half,)
        shapes |= _unit_shapes(path, 2, half)
        width = half
    last = len(config.decoder_rates) + 2
    shapes[f"decoder.model.{last}.alpha"] = (1, width, 1)
    shapes |= _conv_shapes(f"decoder.model.{last + 1}", 1, width, TAPS)
    return shapes


def _conv_shapes(path: str, first: int, second: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.weight_g": (first, 1, 1),
        f"{path}.weight_v": (first, second, width),
        f"{path}.bias": (first,),
    }


def _unit_shapes(path: str, first: int, width: int) -> dict[str, tuple[int, ...]]:
    """Three residual units, numbered from `first`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(first, first + len(DILATIONS)):
        unit = f"{path}.{index}.block"
        shapes |= {f"{unit}.{snake}.alpha": (1, width, 1) for snake in (0, 2)}
        shapes |= _conv_shapes(f"{unit}.1", width, 1, TAPS)
        shapes |= _conv_shapes(f"{unit}.3", width, width, 1)
    return shapes
