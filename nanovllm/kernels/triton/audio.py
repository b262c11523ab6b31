"""The causal layers of audio codecs: Snake, convolution and history in one launch.

The first program of a sequence's channels makes all outputs that depend on the history, and is the
one that updates it, once it has read all that it needs. Others see new frames only. So no program
waits for another, and nothing is copied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.audio import DepthwiseConv

MAX_PAD = 128
"""Frames of a history, that one program must hold."""
BLOCK_CHANNELS = 32
"""Channels of a program: 128 bytes of each frame."""
BLOCK = 1024
"""Values of a program, if its frames are no fewer than the history's: 32 bytes a thread."""


def serves_audio(pad: int) -> bool:
    """Whether the kernels are for a history of so many frames."""
    return pad <= MAX_PAD


def depthwise_conv(x: Tensor, conv: DepthwiseConv, history: Tensor, slots: Tensor) -> Tensor:
    """See `Kernels.depthwise_conv`; a frame's result is the same whatever comes along with it."""
    x = x.contiguous()
    num_seqs, num_frames, channels = x.shape
    out = torch.empty_like(x)
    if out.numel():
        block_frames, block_channels = _block(conv.pad, channels)
        grid = (
            triton.cdiv(num_frames, block_frames),
            triton.cdiv(channels, block_channels),
            num_seqs,
        )
        _depthwise_kernel[grid](
            x,
            out,
            history,
            slots,
            conv.weight,
            conv.bias,
            conv.before,
            conv.after,
            num_frames,
            channels,
            TAPS=len(conv.weight),
            DILATION=conv.dilation,
            BEFORE=conv.before is not None,
            AFTER=conv.after is not None,
            BLOCK_FRAMES=block_frames,
            BLOCK_CHANNELS=block_channels,
            num_warps=8 if block_frames * block_channels > BLOCK else 4,
        )
    return out


def causal_windows(
    x: Tensor, snake: Tensor | None, history: Tensor, slots: Tensor, width: int, stride: int
) -> Tensor:
    """See `Kernels.causal_windows`."""
    x = x.contiguous()
    num_seqs, num_frames, channels = x.shape
    pad = history.shape[1]
    num_windows = num_frames // stride
    out = x.new_empty(num_seqs * num_windows, width * channels)
    if x.numel():
        block_frames, block_channels = _block(pad, channels)
        grid = (
            triton.cdiv(pad + num_frames, block_frames),
            triton.cdiv(channels, block_channels),
            num_seqs,
        )
        _windows_kernel[grid](
            x,
            out,
            history,
            slots,
            snake,
            num_frames,
            num_windows,
            channels,
            PAD=pad,
            WIDTH=width,
            STRIDE=stride,
            SNAKE=snake is not None,
            BLOCK_FRAMES=block_frames,
            BLOCK_CHANNELS=block_channels,
            num_warps=8 if block_frames * block_channels > BLOCK else 4,
        )
    return out


def _block(pad: int, channels: int) -> tuple[int, int]:
    """Frames and channels of a program; the first one's frames are as many as the history's."""
    block_channels = min(triton.next_power_of_2(channels), BLOCK_CHANNELS)
    return max(triton.next_power_of_2(max(pad, 1)), BLOCK // block_channels), block_channels


@triton.jit(do_not_specialize=["num_frames"])
def _depthwise_kernel(
    x_ptr,
    out_ptr,
    history_ptr,
    slots_ptr,
    weight_ptr,
    bias_ptr,
    before_ptr,
    after_ptr,
    num_frames,
    channels,
    TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Convolve some frames of some channels of a sequence."""
    PAD: tl.constexpr = (TAPS - 1) * DILATION
    sequence = tl.program_id(2).to(tl.int64)
    x_ptr += sequence * num_frames * channels
    out_ptr += sequence * num_frames * channels
    if PAD > 0:
        history_ptr += tl.load(slots_ptr + sequence) * PAD * channels
    rows = tl.program_id(0) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)[:, None]
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    is_channel = columns < channels
    y = tl.zeros((BLOCK_FRAMES, BLOCK_CHANNELS), tl.float32)
    y += tl.load(bias_ptr + columns, is_channel, other=0.0)
    for tap in tl.static_range(TAPS):
        frame = _frames(
            x_ptr,
            history_ptr,
            before_ptr,
            rows + tap * DILATION,
            columns,
            num_frames,
            channels,
            PAD,
            BEFORE,
        )
        weight = tl.load(weight_ptr + tap * channels + columns, is_channel, other=0.0)
        y = tl.fma(frame, weight, y)
    if AFTER:
        y = _snake(y, after_ptr, columns, channels)
    tl.store(out_ptr + rows * channels + columns, y, (rows < num_frames) & is_channel)
    if tl.program_id(0) == 0:
        _remember(x_ptr, history_ptr, before_ptr, rows, columns, num_frames, channels, PAD, BEFORE)


@triton.jit(do_not_specialize=["num_frames", "num_windows"])
def _windows_kernel(
    x_ptr,
    out_ptr,
    history_ptr,
    slots_ptr,
    snake_ptr,
    num_frames,
    num_windows,
    channels,
    PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    SNAKE: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Put some frames of a sequence, counted from its history on, into all their windows."""
    sequence = tl.program_id(2).to(tl.int64)
    x_ptr += sequence * num_frames * channels
    out_ptr += sequence * num_windows * WIDTH * channels
    if PAD > 0:
        history_ptr += tl.load(slots_ptr + sequence) * PAD * channels
    rows = tl.program_id(0) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)[:, None]
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    frame = _frames(x_ptr, history_ptr, snake_ptr, rows, columns, num_frames, channels, PAD, SNAKE)
    for place in tl.static_range((WIDTH + STRIDE - 1) // STRIDE):
        window = rows // STRIDE - place
        row_of_window = rows - window * STRIDE
        is_there = (window >= 0) & (window < num_windows) & (row_of_window < WIDTH)
        # int64: windows of a recording may overlap to more than 2^31 values.
        target = (window * WIDTH + row_of_window).to(tl.int64) * channels + columns
        tl.store(out_ptr + target, frame, is_there & (columns < channels))
    if tl.program_id(0) == 0:
        _remember(x_ptr, history_ptr, snake_ptr, rows, columns, num_frames, channels, PAD, SNAKE)


@triton.jit
def _frames(
    x_ptr,
    history_ptr,
    snake_ptr,
    rows,
    columns,
    num_frames,
    channels,
    PAD: tl.constexpr,
    SNAKE: tl.constexpr,
):
    """Frames of the history, and behind it the new ones, after their Snake."""
    new = rows - PAD
    is_channel = columns < channels
    is_new = (new >= 0) & (new < num_frames) & is_channel
    frame = tl.load(x_ptr + new * channels + columns, is_new, other=0.0)
    if SNAKE:
        frame = _snake(frame, snake_ptr, columns, channels)
    if PAD > 0:
        past = tl.load(
            history_ptr + rows * channels + columns, (rows < PAD) & is_channel, other=0.0
        )
        frame = tl.where(rows < PAD, past, frame)
    return frame


@triton.jit
def _remember(
    x_ptr,
    history_ptr,
    snake_ptr,
    rows,
    columns,
    num_frames,
    channels,
    PAD: tl.constexpr,
    SNAKE: tl.constexpr,
):
    """Leave the last `PAD` frames in the history, `rows` being from 0 up to these at least."""
    if PAD > 0:
        last = _frames(
            x_ptr,
            history_ptr,
            snake_ptr,
            num_frames + rows,
            columns,
            num_frames,
            channels,
            PAD,
            SNAKE,
        )
        tl.debug_barrier()  # other threads may still read what this one overwrites
        target = history_ptr + rows * channels + columns
        tl.store(target, last, (rows < PAD) & (columns < channels))


@triton.jit
def _snake(x, table_ptr, columns, channels):
    """`y + sin(alpha y)^2 / alpha` of `y = scale x + shift`; see `audio.snake_table`.

    Fused throughout, so that it is the same to the last bit wherever it is computed.
    """
    table_ptr += columns
    is_channel = columns < channels
    alpha = tl.load(table_ptr, is_channel, other=0.0)
    inverse = tl.load(table_ptr + channels, is_channel, other=0.0)
    scale = tl.load(table_ptr + 2 * channels, is_channel, other=0.0)
    shift = tl.load(table_ptr + 3 * channels, is_channel, other=0.0)
    y = tl.fma(x, scale, shift)
    return tl.fma(_sin_squared(y * alpha), inverse, y)


@triton.jit
def _sin_squared(x):
    """To 3 units in the last place of 1, as far as float32 tells multiples of pi apart.

    The CPU kernels' polynomial, after SLEEF: libdevice's sine takes several times as long.
    """
    n = tl.fma(x, 0.318309886, 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds
    # Pi in three parts (Cody & Waite 1980).
    r = tl.fma(n, -3.140625, x)
    r = tl.fma(n, -9.67502593994140625e-4, r)
    r = tl.fma(n, -1.50995799097837e-7, r)
    r = tl.where(r > 1.6, 1.6, r)  # far out `n` is wrong, and the polynomial must not explode
    r = tl.where(r < -1.6, -1.6, r)
    q = r * r
    p = tl.fma(q, 2.6083159809786593e-6, -1.9810690719168633e-4)
    p = tl.fma(p, q, 8.3330785855650902e-3)
    p = tl.fma(p, q, -1.6666659712791443e-1)
    sine = tl.fma(r * q, p, r)
    return sine * sine
