"""Random draws that depend on a request's seed and the place of the draw, and on nothing else."""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: UInt64Array) -> UInt64Array:
    """Scramble 64-bit words (Steele, Lea & Flood 2014, SplittableRandom's mixing function)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = x ^ (x >> np.uint64(31))
    return mixed


def uniforms(
    seeds: UInt64Array, sample_indices: UInt64Array, output_positions: UInt64Array
) -> npt.NDArray[np.float32]:
    """One draw in [0, 1) for each (seed, sample index, output position), all `[num_rows]`."""
    words = splitmix64(splitmix64(splitmix64(seeds) ^ sample_indices) ^ output_positions)
    # The top 24 bits are what a float32 holds exactly.
    draws: npt.NDArray[np.float32] = (words >> np.uint64(40)).astype(np.float32)
    draws *= np.float32(2**-24)
    return draws


def gaussians(
    seeds: UInt64Array, output_positions: UInt64Array, num_values: int
) -> npt.NDArray[np.float32]:
    """Standard normal draws for each (seed, output position), `[num_rows, num_values]`.

    The words of a counter, two draws from each (Box & Muller 1958).
    """
    counter = np.arange(-(-num_values // 2), dtype=np.uint64)
    rows = splitmix64(splitmix64(seeds) ^ output_positions)
    words = splitmix64(rows[:, None] ^ counter)
    # Halfway between the multiples of 2**-32, so that no logarithm is of zero.
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (words & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    draws: npt.NDArray[np.float32] = pairs.reshape(len(seeds), -1)[:, :num_values]
    return draws.astype(np.float32)
