"""What the routes share."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal
from weakref import WeakSet

from fastapi import Depends, Request

from nanovllm.cluster.stats import PoolStats
from nanovllm.config import ServerConfig, SpeechConfig
from nanovllm.errors import NotReadyError
from nanovllm.server.errors import APIError
from nanovllm.server.response_store import ResponseStore

if TYPE_CHECKING:
    from nanovllm.async_engine import AsyncEngine
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.async_speech import AsyncSpeech
    from nanovllm.server.generation import Generation, RequestInParts
    from nanovllm.server.metrics import Metrics
    from nanovllm.server.speech.utterance import Utterance
    from nanovllm.text.message_format import MessageFormat

Kind = Literal["text", "speech"]
"""What a model makes."""

ELSEWHERE: dict[Kind, str] = {
    "text": "it speaks, at /v1/audio/speech, and does not write",
    "speech": "it writes, at /v1/chat/completions and /v1/completions, and does not speak",
}
"""Of a model that was asked for something of this kind, and is of the other."""


@dataclass
class ServerState:
    """One server's options, models and counters.

    Args:
        config: The options.
        speech_config: Those of speech.
        metrics: What is counted.
        text_model: The model that writes, if there is one; it has a tokenizer and a length once
            `loaded`.
        speech_model: The model that speaks, if there is one.
        voice_names: Names of the voices that clients have added, by id.
        voices_arriving: Names of voices that are being added.
        loaded: Whether the models have been loaded.
        startup_error: Why they could not be.
        generations: What clients wait for, for `/abort` to find by its id.

    Attributes:
        message_formats: How the model writes messages, by its chat templates.
        responses: Those of `/v1/responses` that are kept for a while.
    """

    config: ServerConfig
    speech_config: SpeechConfig
    metrics: "Metrics"
    text_model: "AsyncLLM | None" = None
    speech_model: "AsyncSpeech | None" = None
    loaded: bool = False
    startup_error: BaseException | None = None
    voice_names: dict[str, str] = field(default_factory=dict)
    voices_arriving: set[str] = field(default_factory=set)
    generations: "WeakSet[Generation | RequestInParts | Utterance]" = field(default_factory=WeakSet)
    message_formats: "dict[str, MessageFormat]" = field(init=False, default_factory=dict)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        self.responses = ResponseStore(self.config.max_stored_bytes)

    @property
    def llm(self) -> "AsyncLLM":
        """The model that writes.

        Raises:
            APIError: There is none.
        """
        if self.text_model is None:
            raise self._no_model("text")
        return self.text_model

    @property
    def speech(self) -> "AsyncSpeech":
        """The model that speaks.

        Raises:
            APIError: There is none.
        """
        if self.speech_model is None:
            raise self._no_model("speech")
        return self.speech_model

    @property
    def models(self) -> "list[AsyncEngine[Any]]":
        """All of them."""
        return [model for model in (self.text_model, self.speech_model) if model is not None]

    def names_of(self, kind: Kind) -> tuple[str, ...]:
        """Names that a request may use for the model of a kind; the first is what responses say."""
        model = self.text_model if kind == "text" else self.speech_model
        if model is None:
            return ()
        if kind == "speech" and self.text_model is not None:
            return tuple(self.speech_config.speech_served_model_name or (model.model_id,))
        return tuple(self.config.served_model_name or (model.model_id,))

    def named_models(self) -> "Iterator[tuple[str, AsyncEngine[Any]]]":
        """The models, each with the name that metrics and logs have for it."""
        if self.text_model is not None:
            yield self.names_of("text")[0], self.text_model
        if self.speech_model is not None:
            yield self.names_of("speech")[0], self.speech_model

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that a request may use."""
        return self.text_names + self.names_of("speech")

    @property
    def text_names(self) -> tuple[str, ...]:
        """Names that a request for text may use: the model's own, and those of its adapters."""
        adapters = [] if self.text_model is None else self.text_model.list_loras()
        return (*self.names_of("text"), *adapters)

    def text_adapter(self, model: str | None) -> str | None:
        """The adapter that the `model` of a request for text means; None is none.

        Raises:
            APIError: There is neither a model nor an adapter of this name.
        """
        self.check_model(model)
        return None if model in self.names_of("text") else model

    def answering_name(self, model: str | None) -> str:
        """What an answer says it is from: an adapter's name, or the first of the model's own."""
        return self.text_adapter(model) or self.names_of("text")[0]

    @property
    def is_ready(self) -> bool:
        return self.loaded and all(model.is_ready for model in self.models)

    def voice_id(self, voice: str) -> str | None:
        """The id of a voice that a client has added, by its id or name."""
        if voice in self.voice_names:
            return voice
        return next((key for key, name in self.voice_names.items() if name == voice), None)

    def stats(self) -> PoolStats:
        """All engines as one pool; the averages are the first model's that has some."""
        pools = [model.stats() for model in self.models]
        averaged = next((pool for pool in pools if pool.avg_latency_s), None)
        return PoolStats(
            pools[0].dispatch_policy if pools else "",
            [worker for pool in pools for worker in pool.workers],
            sum(pool.num_inflight for pool in pools),
            sum(pool.num_open_sequences for pool in pools),
            averaged.avg_latency_s if averaged else 0.0,
            averaged.avg_throughput_tok_s if averaged else 0.0,
        )

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that run; whether all have ended in time."""
        return all(await asyncio.gather(*(model.drain(timeout) for model in self.models)))

    async def close(self, force: bool = False) -> None:
        """End the engines and every open request."""
        await asyncio.gather(*(model.close(force) for model in self.models))

    def check_model(self, name: str | None, kind: Kind = "text") -> None:
        """Refuse a name that is not of a model of this kind; none at all is the one there is.

        An adapter of the model that writes counts as one.

        Raises:
            APIError: It is not, or there is no such model.
        """
        if name in (self.text_names if kind == "text" else self.names_of(kind)):
            return
        if name is not None and name not in self.model_names:
            served = ", ".join(f"`{served}`" for served in self.model_names)
            raise APIError(
                404,
                f"The model `{name}` does not exist; this server has {served}.",
                param="model",
                code="model_not_found",
            )
        if name is not None:
            message = f"The model `{name}` cannot do this: {ELSEWHERE[kind]}."
            raise APIError(400, message, param="model")
        if not self.names_of(kind):
            raise self._no_model(kind)

    def _no_model(self, kind: Kind) -> APIError:
        served = ", ".join(f"`{served}`" for served in self.model_names)
        makes = "writes text" if kind == "text" else "speaks"
        return APIError(
            404,
            f"This server has no model that {makes}; it has {served}.",
            param="model",
            code="model_not_found",
        )


def get_state(request: Request) -> ServerState:
    """The state of the app that serves a request."""
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(get_state)]


def require_loaded(state: State) -> None:
    """Refuse what needs a model while it is being loaded.

    Raises:
        NotReadyError: It is.
    """
    if not state.loaded:
        raise NotReadyError("Model server not ready")
