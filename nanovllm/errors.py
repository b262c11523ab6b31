"""Errors a caller can act on, each with the `type` and `code` that an API reports."""


class InvalidRequestError(ValueError):
    """A request or an option that its sender has to change.

    Args:
        message: What is wrong and what would be right.
        param: The offending field, if one is to blame.
    """

    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """A prompt that does not fit the context of the model."""

    code = "context_length_exceeded"

    @classmethod
    def of_prompt(cls, max_model_len: int, num_tokens: int) -> "ContextLengthError":
        """A prompt has so many tokens, and is too long or leaves no room for an output."""
        hint = "" if num_tokens > max_model_len else ", one token must be left for the output"
        return cls(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt alone "
            f"has {num_tokens}: shorten it{hint}",
            "prompt",
        )


class UnsupportedModelError(InvalidRequestError):
    """A checkpoint whose architecture or format nanovllm does not read."""

    code = "unsupported_model"


class NotEnoughMemoryError(RuntimeError):
    """The machine cannot hold the model, its graphs, or a single block of its KV cache."""


class OutOfBlocksError(RuntimeError):
    """No KV block is free; the caller preempts a sequence and asks again."""


class UnavailableError(RuntimeError):
    """The engine cannot take or finish a request now; the same request may succeed later.

    Args:
        message: What is the matter and what to do.
        retry_after: Seconds after which it is worth trying again.
    """

    type = "service_unavailable_error"
    code = "unavailable"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(UnavailableError):
    """More requests are waiting than the queue takes.

    Args:
        message: See above.
        retry_after: See above.
        reason: What there is too much of: "requests", "tokens" or, of waiting, "timeout".
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after: float = 1.0, *, reason: str = "requests") -> None:
        super().__init__(message, retry_after)
        self.reason = reason


class NotReadyError(UnavailableError):
    """No engine runs yet, or they are draining."""

    code = "not_ready"


class EngineDeadError(UnavailableError):
    """The engine process that had the request has died; another one is being started."""

    code = "engine_died"


class RankDiedError(RuntimeError):
    """A process of those that run one model together is gone, and the engine with it.

    The message names the process. The others have been ended: build a new engine.
    """

    code = "rank_died"
