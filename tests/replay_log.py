"""What the tests of replays share: a count of what was written down, and of its repetitions."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from nanovllm.kernels.cpu import replay
from nanovllm.kernels.cpu.replay import Replays


@dataclass
class Log:
    """What was asked of all `Replays` since the test began.

    Attributes:
        recorded: Of each recording whether it could be made.
        num_run: Times that one was repeated.
    """

    recorded: list[bool] = field(default_factory=list)
    num_run: int = 0


def watch_replays(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Begin to count."""
    log = Log()
    record, run = Replays._record, replay._Recording.run

    def count_record(*arguments: Any) -> Any:
        recording = record(*arguments)
        log.recorded.append(recording is not None)
        return recording

    def count_run(*arguments: Any) -> Any:
        log.num_run += 1
        return run(*arguments)

    monkeypatch.setattr(Replays, "_record", count_record)
    monkeypatch.setattr(replay._Recording, "run", count_run)
    return log
