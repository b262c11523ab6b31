"""What audio codecs are made of: Snake activations and causal convolutions that remember.

Frames are rows: a signal is float32 `[num_seqs, num_frames, channels]`. The last frames that a
convolution saw of a sequence are in a table by slot, its *history* `[num_slots, pad, channels]`,
oldest first; zeros are the silence before the start. So a signal may come in pieces of any length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DepthwiseConv:
    """A causal convolution of each channel by itself, between two Snakes.

    Args:
        weight: float32 `[taps, channels]`, the newest frame's last.
        bias: float32 `[channels]`.
        dilation: Frames from one tap to the next.
        before: Snake on the way in, see `snake_table`.
        after: Snake on the way out.
    """

    weight: Tensor
    bias: Tensor
    dilation: int = 1
    before: Tensor | None = None
    after: Tensor | None = None

    @property
    def pad(self) -> int:
        """Frames of its history."""
        return (self.weight.shape[0] - 1) * self.dilation


def snake_table(alpha: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """What `snake` needs, float32 `[4, channels]`: alpha, its inverse, scale and shift."""
    alpha = alpha.flatten().float()
    scale = torch.ones_like(alpha) if scale is None else scale.float()
    shift = torch.zeros_like(alpha) if shift is None else shift.float()
    # The summand is of the reference: no channel divides by zero.
    return torch.stack([alpha, (alpha + 1e-9).reciprocal(), scale, shift])


def snake(x: Tensor, table: Tensor) -> Tensor:
    """`y + sin(alpha y)^2 / alpha` of `y = scale x + shift` (Ziyin et al. 2020, equation 3)."""
    alpha, inverse, scale, shift = table
    x = torch.addcmul(shift, x, scale)
    return torch.addcmul(x, inverse, (x * alpha).sin().square())


def depthwise_conv(x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor) -> Tensor:
    """See `Kernels.depthwise_conv`."""
    frames = remember(x if conv.before is None else snake(x, conv.before), history, slots)
    num_frames = x.shape[1]
    y = conv.bias.expand_as(x)
    for tap, weight in enumerate(conv.weight):
        first = tap * conv.dilation
        y = torch.addcmul(y, frames[:, first : first + num_frames], weight)
    return y if conv.after is None else snake(y, conv.after)


def causal_windows(
    x: Tensor, table: Tensor | None, history: Tensor, slots: Tensor, width: int, stride: int
) -> Tensor:
    """See `Kernels.causal_windows`."""
    frames = remember(x if table is None else snake(x, table), history, slots)
    num_windows, channels = x.shape[1] // stride, x.shape[2]
    windows = frames.unfold(1, width, stride)[:, :num_windows]  # [.., channels, width]
    return windows.transpose(2, 3).reshape(-1, width * channels)


def remember(x: Tensor, history: Tensor, slots: Tensor) -> Tensor:
    """Put the history in front, `[num_seqs, pad + num_frames, channels]`, and update it."""
    pad = history.shape[1]
    if not pad:
        return x
    frames = torch.cat([history[slots], x], dim=1)
    history.index_copy_(0, slots, frames[:, -pad:])
    return frames
