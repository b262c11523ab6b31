"""A runner whose model is shared out to the ranks of a tensor-parallel group, a process each.

Every rank runs the same steps with the same code, on its part of the weights and of the heads. What
they exchange makes their logits equal, so all of them sample the same, and follow grammars alike;
only the first one's results are read.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nanovllm.batch import Batch, Key, SlotStart, StepResult, TextRequest
from nanovllm.errors import RankDiedError
from nanovllm.interrupts import interrupts_held_back
from nanovllm.models.adapters import AdapterTable
from nanovllm.runners.text import TextRunner
from nanovllm.runners.voice_encoding import VoiceEncoding


class Launch(NamedTuple):
    """Start a step, which has this number."""

    number: int
    batch: Batch


class Collect(NamedTuple):
    """Bring a step to its end."""

    number: int


class LoadAdapter(NamedTuple):
    """Read an adapter; the first rank could."""

    adapter_id: int
    directory: Path


class UnloadAdapter(NamedTuple):
    """Forget an adapter."""

    adapter_id: int


Call = Launch | Collect | LoadAdapter | UnloadAdapter
"""What the first rank tells the others to do."""


class Ranks(Protocol):
    """The other ranks, seen from the first one."""

    def check(self) -> None:
        """See that all of them live.

        Raises:
            RankDiedError: One does not; the message names it.
        """

    def send(self, call: Call) -> None:
        """Tell all of them to do something; raises like `check`."""

    def lost(self) -> RankDiedError:
        """Why they do not answer, once that is known; ends them."""

    def fail(self, error: RankDiedError) -> Exception:
        """End them, as the first rank cannot go on; returns the error that came before, or this."""

    def close(self) -> None:
        """End them."""


class ParallelRunner:
    """The first rank's runner, which has the others do what it does.

    A step that fails on any rank leaves the others within it, so it is the end of all.

    Args:
        runner: Runs this rank's part.
        ranks: The others.
    """

    def __init__(self, runner: TextRunner, ranks: Ranks) -> None:
        self._runner, self._ranks = runner, ranks
        self._num_launched = 0
        self.num_kv_blocks = runner.num_kv_blocks
        self.max_model_len = runner.max_model_len
        self.block_size = runner.block_size
        self.grammars = runner.grammars
        self.adapters = None
        if runner.adapters is not None:
            self.adapters = ParallelAdapters(runner.adapters, ranks)
        # Also for whoever just drops us, and at the end of the program.
        self._finalizer = weakref.finalize(self, ranks.close)

    def launch(self, batch: Batch) -> tuple[int, Any]:
        """Start a step on all ranks; see `ModelRunner.launch`.

        Raises:
            RankDiedError: A rank is gone, or was before.
        """
        self._ranks.check()
        with self._whole():
            number = self._num_launched
            self._num_launched += 1
            self._ranks.send(Launch(number, _without_matchers(batch)))
            return number, self._runner.launch(batch)

    def collect(self, handle: tuple[int, Any]) -> list[StepResult]:
        """Wait for a step; see `ModelRunner.collect`. Raises like `launch`."""
        number, step = handle
        self._ranks.check()
        with self._whole():
            self._ranks.send(Collect(number))
            results = self._runner.collect(step)
        self._ranks.check()  # what came after a rank was lost would be wrong
        return results

    def check(self, keys: Sequence[Key], payload: object) -> None:
        """See `ModelRunner.check`."""
        self._runner.check(keys, payload)

    def encode(self, audio: bytes) -> VoiceEncoding:
        """See `ModelRunner.encode`."""
        return self._runner.encode(audio)

    def check_alive(self) -> None:
        """See that all ranks live.

        Raises:
            RankDiedError: One does not.
        """
        self._ranks.check()

    def close(self) -> None:
        """End the other ranks."""
        self._finalizer()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Run a piece of a step to its end, or end the ranks with it.

        Ctrl-C waits for that: the ranks cannot leave a step one by one.
        """
        with interrupts_held_back():
            try:
                yield
            except RankDiedError as e:
                raise self._ranks.lost() from e
            except BaseException as e:
                ours = RankDiedError(f"tensor-parallel rank 0 failed: {type(e).__name__}: {e}")
                cause = self._ranks.fail(ours)
                if cause is not ours:
                    raise RankDiedError(str(cause)) from e
                raise


class ParallelAdapters:
    """The adapters of all ranks, of which each has its part.

    Args:
        table: The first rank's.
        ranks: The others.
    """

    def __init__(self, table: AdapterTable, ranks: Ranks) -> None:
        self._table, self._ranks = table, ranks

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._table

    def load(self, adapter_id: int, directory: Path) -> list[str]:
        """See `AdapterTable.load`."""
        with interrupts_held_back():
            names = self._table.load(adapter_id, directory)
            self._ranks.send(LoadAdapter(adapter_id, directory.expanduser().absolute()))
        return names

    def unload(self, adapter_id: int) -> None:
        """See `AdapterTable.unload`."""
        with interrupts_held_back():
            self._table.unload(adapter_id)
            self._ranks.send(UnloadAdapter(adapter_id))


def follow(runner: TextRunner, next_call: Callable[[], Call]) -> None:
    """Do what the first rank says, on another one; returns never.

    Args:
        runner: Runs this rank's part.
        next_call: Waits for what is next.
    """
    steps: deque[tuple[int, Any]] = deque()
    while True:
        call = next_call()
        if isinstance(call, Launch):
            steps.append((call.number, runner.launch(call.batch)))
        elif isinstance(call, Collect):
            # The engine drops the steps behind one that failed, or was interrupted.
            while steps[0][0] < call.number:
                steps.popleft()
            runner.collect(steps.popleft()[1])
        elif runner.adapters is None:
            raise RuntimeError("this rank has no adapters")
        elif isinstance(call, LoadAdapter):
            runner.adapters.load(call.adapter_id, call.directory)
        else:
            runner.adapters.unload(call.adapter_id)


def _without_matchers(batch: Batch) -> Batch:
    """The batch for another process: each compiles the grammars for itself."""
    return replace(batch, started=[_without_matcher(start) for start in batch.started])


def _without_matcher(start: SlotStart) -> SlotStart:
    if not isinstance(start.payload, TextRequest) or start.payload.matcher is None:
        return start
    return replace(start, payload=start.payload._replace(matcher=None))
