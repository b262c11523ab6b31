"""The layers of AudioVAE: causal convolutions that carry what they saw from piece to piece.

Weight norm (Salimans & Kingma 2016) is folded when a layer is built. A layer says how many frames
it remembers of a sequence, and its caller keeps the tables; see `nanovllm.kernels.audio`.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.kernels.audio import DepthwiseConv, remember, snake_table
from nanovllm.kernels.kernels import Kernels, WeightSpec

TAPS = 7
"""Width of all convolutions that neither resample nor mix channels only."""
DILATIONS = (1, 3, 9)


class History(NamedTuple):
    """What a layer remembers of a sequence: so many frames of so many channels."""

    pad: int
    channels: int


class Layer(Protocol):
    """A causal layer on channels-last signals."""

    @property
    def history(self) -> History:
        """The shape of its table, but for the slots."""

    def __call__(self, x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
        """Map the next frames of some sequences, `[num_seqs, num_frames, channels]`.

        Args:
            x: May be overwritten.
            history: `[num_slots, pad, channels]`; the sequences' rows are updated.
            slots: int64 `[num_seqs]`.
        """


class Tensors:
    """The tensors of a checkpoint, folded and on the device where they are needed.

    Args:
        tensors: By their names.
        kernels: Take the matrices over; float32.
        device: Where the other tensors go.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], kernels: Kernels, device: torch.device
    ) -> None:
        self._tensors, self.kernels, self.device = tensors, kernels, device

    def get(self, name: str) -> Tensor:
        return self._tensors[name].to(self.device, torch.float32)

    def weight(self, path: str) -> Tensor:
        """`g v / |v|`, the norm over all dimensions but the first."""
        direction = self.get(f"{path}.weight_v")
        norm = direction.flatten(1).norm(dim=1)[:, None, None]
        weight: Tensor = direction * (self.get(f"{path}.weight_g") / norm)
        return weight

    def bias(self, path: str) -> Tensor:
        return self.get(f"{path}.bias")

    def snake(self, path: str) -> Tensor:
        return snake_table(self.get(f"{path}.alpha"))


class Convolution:
    """A causal convolution as one product: every output frame sees `width` frames of its input.

    Args:
        kernels: Compute.
        weight: `[out_channels * upsample, width * in_channels]`, the oldest frame's inputs first;
            `upsample` output frames lie in a row.
        bias: `[out_channels * upsample]`.
        width: Frames that it sees.
        stride: Input frames from one output to the next.
        pad: Frames that it remembers, at least `width - stride`.
        upsample: Output frames of a product.
        snake: Snake on the way in, see `snake_table`.
    """

    def __init__(
        self,
        kernels: Kernels,
        weight: Tensor,
        bias: Tensor,
        *,
        width: int = 1,
        stride: int = 1,
        pad: int | None = None,
        upsample: int = 1,
        snake: Tensor | None = None,
    ) -> None:
        rows, depth = weight.shape
        self._kernels, self._snake = kernels, snake
        self._weight = kernels.pack(WeightSpec(rows, depth), [weight.contiguous()], bias)
        self._width, self._stride = width, stride
        self._upsample = upsample
        self.history = History(width - stride if pad is None else pad, depth // width)

    def __call__(self, x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
        windows = self._kernels.causal_windows(
            x, self._snake, history, slots, self._width, self._stride
        )
        y = self._kernels.linear(windows, self._weight)
        num_frames = x.shape[1] // self._stride * self._upsample
        return y.view(len(x), num_frames, y.shape[1] // self._upsample)


def convolution(
    tensors: Tensors,
    path: str,
    *,
    stride: int = 1,
    pad: int | None = None,
    snake: Tensor | None = None,
) -> Convolution:
    """A `Conv1d` of the checkpoint, `[out_channels, in_channels, width]`."""
    weight = tensors.weight(path)
    width = weight.shape[2]
    rows = weight.transpose(1, 2).flatten(1)
    return Convolution(
        tensors.kernels,
        rows,
        tensors.bias(path),
        width=width,
        stride=stride,
        pad=pad,
        snake=snake,
    )


def transposed_convolution(tensors: Tensors, path: str, stride: int, snake: Tensor) -> Convolution:
    """A `ConvTranspose1d` of the checkpoint, `[in_channels, out_channels, 2 * stride]`.

    Output `j` of `stride` after input `t` is `W[:, :, j]^T x_t + W[:, :, stride + j]^T x_{t-1}`.
    """
    weight = tensors.weight(path)
    weight = weight.view(*weight.shape[:2], 2, stride).flip(2)  # x_{t-1} is the older one
    rows = weight.permute(3, 1, 2, 0).flatten(2).flatten(0, 1)
    bias = tensors.bias(path).repeat(stride)
    return Convolution(tensors.kernels, rows, bias, width=2, upsample=stride, snake=snake)


def depthwise_weight(tensors: Tensors, path: str) -> Tensor:
    """Weight of a `Conv1d` with as many groups as channels, `[taps, channels]`."""
    return tensors.weight(path)[:, 0].T.contiguous()


class Depthwise:
    """A convolution of each channel by itself, with nothing around it."""

    def __init__(self, tensors: Tensors, path: str) -> None:
        self._kernels = tensors.kernels
        self._conv = DepthwiseConv(depthwise_weight(tensors, path), tensors.bias(path))
        self.history = History(self._conv.pad, len(self._conv.bias))

    def __call__(self, x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
        return self._kernels.depthwise_conv(x, self._conv, history, slots)


class ResidualUnit:
    """Snake, dilated depthwise convolution, Snake and a mix of the channels, added to the input."""

    def __init__(self, tensors: Tensors, path: str, dilation: int) -> None:
        self._kernels = tensors.kernels
        self._conv = DepthwiseConv(
            depthwise_weight(tensors, f"{path}.block.1"),
            tensors.bias(f"{path}.block.1"),
            dilation,
            before=tensors.snake(f"{path}.block.0"),
            after=tensors.snake(f"{path}.block.2"),
        )
        mix = tensors.weight(f"{path}.block.3")[:, :, 0].contiguous()
        spec = WeightSpec(*mix.shape)
        self._mix = tensors.kernels.pack(spec, [mix], tensors.bias(f"{path}.block.3"))
        self.history = History(self._conv.pad, len(mix))

    def __call__(self, x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
        hidden = self._kernels.depthwise_conv(x, self._conv, history, slots)
        total = self._kernels.linear_add(hidden.flatten(0, 1), self._mix, x.flatten(0, 1))
        return total.view_as(x)


class Waveform:
    """Snake, a convolution to one channel, and tanh: the end of the decoder.

    The channels are summed for each tap first, and the taps, `[num_frames, TAPS]`, are what it
    remembers: less than frames of all channels, and a product without windows.
    """

    def __init__(self, tensors: Tensors, snake: str, path: str) -> None:
        self._kernels = tensors.kernels
        self._snake, self._bias = tensors.snake(snake), tensors.bias(path)
        taps = tensors.weight(path)[0].T.contiguous()  # [TAPS, channels]
        self._weight = tensors.kernels.pack(WeightSpec(*taps.shape), [taps], None)
        self._nothing = torch.empty(1, 0, taps.shape[1], device=tensors.device)
        self.history = History(TAPS - 1, TAPS)

    def __call__(self, x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
        """Map `[num_seqs, num_frames, channels]` to samples `[num_seqs, num_frames]`."""
        num_seqs, num_frames, _ = x.shape
        rows = self._kernels.causal_windows(x, self._snake, self._nothing, slots, 1, 1)
        taps = self._kernels.linear(rows, self._weight).view(num_seqs, num_frames, TAPS)
        frames = remember(taps, history, slots)
        # Tap k of output t is that of frame t + k.
        diagonal = frames.as_strided(
            (num_seqs, num_frames, TAPS), (frames.stride(0), TAPS, TAPS + 1)
        )
        return (diagonal.sum(-1) + self._bias).tanh()
