"""The one LoRA adapter of nanovllm-voxcpm's first version, beside those that requests name."""

import itertools
from collections.abc import Awaitable
from typing import Protocol

from nanovllm.errors import InvalidRequestError


class NamedAdapters(Protocol):
    """A model's adapters by name; see `AsyncSpeech`."""

    def register_lora(self, name: str, path: str) -> Awaitable[list[str]]:
        """Load one."""

    def unregister_lora(self, name: str) -> Awaitable[None]:
        """Forget one, once nobody uses it any more."""

    def list_loras(self) -> list[str]:
        """Names of those that requests may use."""


class SingleAdapter:
    """The adapter of requests that name none, which can be replaced, switched off and forgotten.

    It is one of the model's adapters, called `default/` and a number. Of several that are loaded at
    once the last to be there stays.

    Args:
        model: What has the adapters.
    """

    def __init__(self, model: NamedAdapters) -> None:
        self._model = model
        self._numbers = itertools.count(1)
        self._loaded: str | None = None
        self._enabled = False

    @property
    def name(self) -> str | None:
        """What requests that name none use."""
        return self._loaded if self._enabled and self._is_there else None

    async def load(self, path: str) -> list[str]:
        """Load an adapter in place of the one before, and use it.

        That one is used until the new one is there, and stays if it cannot be loaded.

        Returns:
            The names of its tensors.

        Raises:
            InvalidRequestError: The directory holds no adapter that fits.
            UnavailableError: No engine runs; try again later.
        """
        name = f"default/{next(self._numbers)}"
        tensors = await self._model.register_lora(name, path)
        before = self._loaded if self._is_there else None
        self._loaded, self._enabled = name, True
        if before is not None:
            await self._model.unregister_lora(before)
        return tensors

    def enable(self, enabled: bool) -> None:
        """Use it, or leave it be.

        Raises:
            InvalidRequestError: There is none.
        """
        if enabled and not self._is_there:
            raise InvalidRequestError("there is no adapter: load one first", "enabled")
        self._enabled = enabled

    async def reset(self) -> None:
        """Forget it, once nobody uses it any more."""
        before = self._loaded if self._is_there else None
        self._loaded, self._enabled = None, False
        if before is not None:
            await self._model.unregister_lora(before)

    @property
    def _is_there(self) -> bool:
        """Whether it has been loaded, and nobody has forgotten it by its name."""
        return self._loaded in self._model.list_loras()
