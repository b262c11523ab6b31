"""What the routes share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated
from weakref import WeakSet

from fastapi import Depends, Request

from nanovllm.config import ServerConfig
from nanovllm.errors import NotReadyError

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.server.metrics import Metrics
    from nanovllm.server.openai.generation import Generation


@dataclass
class ServerState:
    """One server's options, model and counters.

    Args:
        config: The options.
        llm: The model; it has a tokenizer and a length once `loaded`.
        metrics: What is counted.
        loaded: Whether the model has been loaded.
        startup_error: Why it could not be.
        generations: What clients wait for, for `/abort` to find by its id.
    """

    config: ServerConfig
    llm: "AsyncLLM"
    metrics: "Metrics"
    loaded: bool = False
    startup_error: BaseException | None = None
    generations: "WeakSet[Generation]" = field(default_factory=WeakSet)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that a request may use; the first is what responses say."""
        return tuple(self.config.served_model_name or (self.llm.model_id,))

    @property
    def is_ready(self) -> bool:
        return self.loaded and self.llm.is_ready


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
        raise NotReadyError("the model is being loaded; /ready tells when it is there")
