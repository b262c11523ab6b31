"""What a user gets back. Names and fields are vLLM's."""

from collections import deque
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Logprob:
    """Log probability of one token at one position, before penalties and temperature.

    `rank` counts from 1; `decoded_token` is None when the request is not detokenised.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: Which of the request's `n` completions this is.
        text: The text so far, without what may yet turn out to be a stop string.
        token_ids: The ids so far, the one that stopped it included.
        cumulative_logprob: Sum of the sampled tokens' log probabilities, if they were asked for.
        logprobs: For each token, its own and the most likely ones by id, if they were asked for.
        finish_reason: "stop", "length", "abort", "error", or None while unfinished.
        stop_reason: The stop string or stop token id it ended at, or the text of an error; None
            for the model's own end-of-text id.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Monotonic times in seconds: when the request came, first ran, first emitted and ended."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions. `out["text"]` and `out["token_ids"]` are the first one's.

    `embedding` is what the model made of the prompt, if that was asked for: see `TextPayload`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    embedding: bytes | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, of all completions."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    def snapshot(self) -> "RequestOutput":
        """A copy that later steps leave alone."""
        outputs = [
            replace(
                out,
                token_ids=list(out.token_ids),
                logprobs=None if out.logprobs is None else list(out.logprobs),
            )
            for out in self.outputs
        ]
        return replace(self, outputs=outputs, metrics=replace(self.metrics))

    def __getitem__(self, name: str) -> str | list[int]:
        if name not in ("text", "token_ids"):
            raise KeyError(f"{name!r}; only 'text' and 'token_ids' can be read so")
        value: str | list[int] = getattr(self.outputs[0], name)
        return value


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt, of length 1."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class SpeechOutput:
    """A request for speech, and how far it is.

    Args:
        request_id: Its name.
        text: What is spoken.
        sample_rate: Of its sound, in Hz.
        num_prompt_tokens: Positions of the prompt: text, and patches of recordings.
        metrics: When what happened.
        num_target_tokens: Tokens of `text` alone.
        num_patches: Patches generated so far.
        num_samples: Samples they are decoded to.
        unread: Sound of the latest patches, until a stream has handed it on: float32 samples.
        latents: Each patch's latents, float32 `[patch_size, feat_dim]`; None unless asked for.
        finish_reason: "stop", "length", "abort", "error", or None while unfinished.
        stop_reason: The text of an error.
        num_cached_tokens: Positions of the prompt that came from the prefix cache.
    """

    request_id: str
    text: str
    sample_rate: int
    num_prompt_tokens: int
    metrics: RequestMetrics
    num_target_tokens: int = 0
    num_patches: int = 0
    num_samples: int = 0
    unread: deque[bytes] = field(default_factory=deque, repr=False)
    latents: list[bytes] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Positions generated so far: patches."""
        return self.num_patches

    @property
    def duration(self) -> float:
        """Seconds of sound so far."""
        return self.num_samples / self.sample_rate
