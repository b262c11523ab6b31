"""The options of the benchmark of speech, apart from it so that the command line loads at once."""

import math
from dataclasses import dataclass

from nanovllm.bench.serve_config import Load
from nanovllm.errors import InvalidRequestError

LOWEST = {
    **dict.fromkeys(("num_requests", "audio_seconds"), 0.001),
    **dict.fromkeys(("num_warmups", "cfg_value", "prompt_seconds"), 0),
    "inference_timesteps": 2,
}
"""The least that options may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechBenchConfig:
    """A load of speech, without a server: an engine in a process of its own.

    Args:
        release: Size of the model where `dummy_weights` fills it: "0.5b", "1.5" or "2".
        concurrency: Closed loops to run one after the other: so many clients that each wait for
            the end of their speech.
        request_rate: An open loop in place of that: requests per second on average, at
            exponentially distributed gaps.
        num_requests: Requests of each load; None is four for each client, and 32 in an open loop.
        audio_seconds: Sound that each request asks for, rounded up to whole patches.
        prompt_seconds: Sound of the voice that each continues; 0 is none.
        inference_timesteps: Steps of the sampler.
        cfg_value: Weight of the guidance; 1 does without, at half the work.
        num_warmups: Requests before, which do not count.
        seed: Of the noise and of the gaps.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    release: str | None = None
    concurrency: list[int] | None = None
    request_rate: float | None = None
    num_requests: int | None = None
    audio_seconds: float = 8.0
    prompt_seconds: float = 0.0
    inference_timesteps: int = 10
    cfg_value: float = 2.0
    num_warmups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise InvalidRequestError(f"{name} must be at least {low}, got {value}", name)
        if self.concurrency is not None and self.request_rate is not None:
            raise InvalidRequestError(
                "concurrency (closed loop) and request_rate (open loop) exclude each other"
            )
        if self.request_rate is not None and not self.request_rate > 0:
            raise InvalidRequestError(
                f"request_rate must be above 0, got {self.request_rate}", "request_rate"
            )
        if self.concurrency is not None and min(self.concurrency) < 1:
            raise InvalidRequestError(
                f"concurrency must be at least 1, got {min(self.concurrency)}", "concurrency"
            )

    def loads(self) -> list[Load]:
        """The loads to run, in order."""
        if self.request_rate is not None:
            return [Load(request_rate=self.request_rate)]
        return [Load(concurrency=number) for number in self.concurrency or [1, 8]]

    def num_requests_of(self, load: Load) -> int:
        """How many requests a load sends."""
        if self.num_requests is not None:
            return self.num_requests
        return 32 if load.concurrency is None else 4 * load.concurrency
