"""What a client asks of an engine process besides sequences: voices to encode, LoRA adapters."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from nanovllm.batch import Key
from nanovllm.errors import InvalidRequestError
from nanovllm.worker.messages import AddRequest, Answer, EncodeAudio, LoadAdapter, UnloadAdapter

logger = logging.getLogger(__name__)

STEP_SHARE = 0.15
"""Time for encoding after a step, as a share of the step's: streams come that much later."""
IDLE_SLICE = 0.05
"""Seconds of encoding without a look at new requests while there are no sequences."""


class Encoding(Protocol):
    """A recording that is being encoded."""

    @property
    def num_frames_left(self) -> int:
        """Frames that are still to be encoded."""

    def advance(self, num_frames: int) -> None:
        """Encode so many frames more."""

    def latents(self) -> bytes:
        """What has been encoded."""


class Adapters(Protocol):
    """The LoRA adapters of a model."""

    def __contains__(self, adapter_id: int) -> bool:
        """Whether an adapter is loaded."""

    def load(self, adapter_id: int, directory: Path) -> list[str]:
        """Read an adapter; returns the names of its tensors.

        Raises:
            InvalidRequestError: There is none, or it does not fit the model.
        """

    def unload(self, adapter_id: int) -> None:
        """Forget an adapter that no open sequence uses."""


class Callee(Protocol):
    """A runner, as far as calls go."""

    @property
    def adapters(self) -> Adapters | None:
        """Its adapters, if it was started with room for them."""

    def check(self, keys: Sequence[Key], payload: object) -> None:
        """See that a request's sequences can start.

        Raises:
            InvalidRequestError: They cannot.
        """

    def encode(self, audio: bytes) -> Encoding:
        """Begin to encode a recording.

        Raises:
            ValueError: It cannot be encoded, or the model hears nothing.
        """


class Calls:
    """Carries calls out and answers them.

    Recordings take turns, a slice each. After a step they get a share of its time.
    A slice is a frame at least: where that takes longer, the next ones wait until it is made up
    for.

    Args:
        callee: Does the work.
        answer: Takes the answers.
    """

    def __init__(self, callee: Callee, answer: Callable[[Answer], None]) -> None:
        self._callee = callee
        self._answer = answer
        self._encodings: deque[tuple[int, Encoding]] = deque()
        self._frame_time = 0.0
        self._credit = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a recording is being encoded."""
        return bool(self._encodings)

    def take(self, call: EncodeAudio | LoadAdapter | UnloadAdapter) -> None:
        """Begin with a call; adapters are dealt with at once, before requests that name them."""
        try:
            if isinstance(call, EncodeAudio):
                self._encodings.append((call.call_id, self._callee.encode(call.audio)))
                return
            adapters = self._require_adapters()
            names: list[str] = []
            if isinstance(call, LoadAdapter):
                names = adapters.load(call.adapter_id, Path(call.directory))
            else:
                adapters.unload(call.adapter_id)
        except Exception as e:  # noqa: BLE001  # the caller is told, and the engine goes on
            self._fail(call.call_id, e)
        else:
            self._answer(Answer(call.call_id, "\n".join(names).encode()))

    def cancel(self, call_id: int) -> None:
        """Drop a recording that nobody waits for; what has been answered does not matter."""
        kept = deque(item for item in self._encodings if item[0] != call_id)
        if len(kept) < len(self._encodings):
            self._encodings = kept
            self._answer(Answer(call_id))

    def check(self, request: AddRequest) -> None:
        """See that a request's sequences can start: in a step they would take others along.

        Raises:
            InvalidRequestError: They cannot.
        """
        self._callee.check(request.keys, request.payload)
        if request.adapter_id is not None and request.adapter_id not in self._require_adapters():
            raise InvalidRequestError(f"the adapter with id {request.adapter_id} is not loaded")

    def advance_after(self, step_time: float) -> None:
        """Encode a little after a step that took so many seconds."""
        budget = STEP_SHARE * step_time
        self._credit = min(self._credit + budget, max(budget, self._frame_time))
        if self._encodings and self._credit >= self._frame_time:
            self._credit -= self._advance(budget)

    def advance_idle(self) -> None:
        """Encode while nobody listens."""
        if self._encodings:
            self._advance(IDLE_SLICE)

    def _advance(self, budget: float) -> float:
        """Encode the next slice, of about so many seconds; returns what it took."""
        call_id, encoding = self._encodings.popleft()
        num_frames = int(budget / self._frame_time) if self._frame_time else 1
        num_frames = min(max(num_frames, 1), encoding.num_frames_left)
        started = time.perf_counter()
        try:
            encoding.advance(num_frames)
            if encoding.num_frames_left:
                self._encodings.append((call_id, encoding))
            else:
                self._answer(Answer(call_id, encoding.latents()))
        except Exception as e:  # noqa: BLE001  # as above
            self._fail(call_id, e)
        elapsed = time.perf_counter() - started
        self._frame_time = elapsed / num_frames
        return elapsed

    def _require_adapters(self) -> Adapters:
        if self._callee.adapters is None:
            raise InvalidRequestError("this engine was started without LoRA adapters")
        return self._callee.adapters

    def _fail(self, call_id: int, error: Exception) -> None:
        if not isinstance(error, ValueError | OSError):
            logger.error("a call failed", exc_info=error)
        self._answer(Answer(call_id, kind=type(error).__name__, message=str(error)))
