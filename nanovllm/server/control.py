"""What the control socket's commands act on: all models of the server."""

from typing import TYPE_CHECKING

from nanovllm.cluster.stats import PoolStats
from nanovllm.errors import InvalidRequestError, NotReadyError
from nanovllm.server.state import ServerState

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM


class ControlledServer:
    """The server as `cluster.control` sees it.

    Args:
        state: The server.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state

    @property
    def max_model_len(self) -> int:
        return self._llm.max_model_len

    @property
    def is_ready(self) -> bool:
        return self._state.is_ready

    def stats(self) -> PoolStats:
        return self._state.stats()

    async def warm(self, prompt: str | list[int]) -> int:
        return await self._llm.warm(prompt)

    async def drain(self, timeout: float | None = None) -> bool:
        return await self._state.drain(timeout)

    @property
    def _llm(self) -> "AsyncLLM":
        if not self._state.loaded:
            raise NotReadyError("the model is being loaded: try again")
        if self._state.text_model is None:
            raise InvalidRequestError("there is no model that writes text, and no other is warmed")
        return self._state.text_model
