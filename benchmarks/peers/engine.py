"""What every engine of the benchmark is to the worker that drives it."""

import time
from dataclasses import dataclass
from typing import Literal, Protocol

from peers.workloads import Request

Precision = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine starts with.

    Args:
        model: Directory or file of the weights, as the engine reads them.
        precision: Of the weights; activations are bf16, or whatever the engine makes of them.
        num_threads: Threads to compute with.
        max_model_len: Longest prompt plus output in tokens.
        kv_bytes: Room for keys and values.
        max_num_seqs: Sequences that may run at once.
    """

    model: str
    precision: Precision
    num_threads: int
    max_model_len: int
    kv_bytes: int
    max_num_seqs: int = 256


class Trace:
    """When each step ended and how many tokens it gave, from the creation of this object on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.steps: list[tuple[float, int]] = []

    def add(self, num_tokens: int) -> None:
        if num_tokens:
            self.steps.append((time.perf_counter() - self._start, num_tokens))

    @property
    def seconds(self) -> float:
        return self.steps[-1][0]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.steps)

    def decode_seconds(self, num_seqs: int) -> float | None:
        """Mean time of a step in which all sequences decode; None if there are no such steps."""
        ends = [end for end, count in self.steps if count == num_seqs]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None


class Engine(Protocol):
    """An engine that has loaded its model, built from `Settings`."""

    def __init__(self, settings: Settings) -> None: ...

    def run(self, requests: list[Request], temperature: float, needs_steps: bool) -> Trace:
        """Generate for all requests, past any end of text.

        Returns:
            A step for each step of the engine, or a single one for all if `needs_steps` is false.
        """
        ...
