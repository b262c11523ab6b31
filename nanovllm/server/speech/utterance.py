"""What one request has the engines say."""

import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from nanovllm.audio.files import Samples
from nanovllm.batch import UNUSABLE_PATCH
from nanovllm.errors import UnavailableError
from nanovllm.server.errors import INTERNAL_ERROR, APIError, in_words_of_client
from nanovllm.server.speech.inputs import SpeechPrompt
from nanovllm.server.state import ServerState
from nanovllm.speech_params import SpeechParams

if TYPE_CHECKING:
    from nanovllm.long_speech import LongSpeech
    from nanovllm.outputs import SpeechOutput
    from nanovllm.speech_stream import SpeechStream

logger = logging.getLogger(__name__)


class SpeechUsage(TypedDict):
    """What was used: positions of prompts, and patches of speech."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class Utterance:
    """A request's speech. Closing or dropping it aborts what has not ended.

    Args:
        state: The server.
        request_id: What the client knows it by.
        text: What to say.
        params: How. With `retry_badcase` nothing is heard before all of it is there.
        prompt: In whose voice.
        lora_name: With which adapter.
        fields: What the client calls the arguments of `AsyncSpeech.generate`, where not the same.
        by_sentence: Whether to say it sentence by sentence.
    """

    def __init__(
        self,
        state: ServerState,
        request_id: str,
        text: str,
        params: SpeechParams,
        prompt: SpeechPrompt,
        lora_name: str | None,
        fields: Mapping[str, str],
        *,
        by_sentence: bool = False,
    ) -> None:
        self.request_id = request_id
        self.names = {request_id}
        self.num_samples = 0
        self._state = state
        self._text = text
        self._params = params
        self._fields = fields
        self._by_sentence = by_sentence
        self._name = uuid.uuid4().hex  # our own: two clients may send the same X-Request-Id
        self._options: dict[str, Any] = {
            **prompt._asdict(),
            "lora_name": lora_name,
            "request_id": self._name,
        }
        self._stream: SpeechStream | LongSpeech | None = None
        self._output: SpeechOutput | None = None

    async def start(self) -> "Utterance":
        """Check the request and queue it; what is wrong with it shows now.

        Raises:
            InvalidRequestError: It cannot be used.
            UnavailableError: The queue is full, or no engine is running.
        """
        speech = self._state.speech
        if not self._params.retry_badcase:
            generate = speech.generate_long if self._by_sentence else speech.generate
            with in_words_of_client(self._fields):
                self._stream = await generate(self._text, self._params, **self._options)
        self._state.generations.add(self)
        return self

    async def abort(self) -> bool:
        """End it; its client gets what there is. False if it has ended already."""
        if self._stream is not None:
            return self._stream.abort()
        return await self._state.speech.abort(self._name)

    async def chunks(self) -> AsyncIterator[Samples]:
        """Float32 mono samples as they are made.

        Raises:
            UnavailableError: The engine has died, or nobody has read for too long.
            APIError: The speech could not be computed.
        """
        try:
            if self._stream is None:
                speak = self._state.speech.speak
                with in_words_of_client(self._fields):
                    speech = await speak(self._text, self._params, **self._options)
                self._output = speech.output
                self.num_samples = len(speech.audio)
                yield speech.audio
                return
            async for chunk in self._stream:
                self.num_samples += len(chunk)
                yield chunk
        except RuntimeError as e:
            raise self._failure(e) from e

    def usage(self) -> SpeechUsage:
        """Positions so far."""
        output = self._output if self._stream is None else self._stream.output
        num_prompt = 0 if output is None else output.num_prompt_tokens
        num_patches = 0 if output is None else output.num_tokens
        return {
            "input_tokens": num_prompt,
            "output_tokens": num_patches,
            "total_tokens": num_prompt + num_patches,
        }

    async def aclose(self) -> None:
        """Abort what has not ended."""
        if self._stream is not None:
            await self._stream.aclose()

    def _failure(self, e: RuntimeError) -> Exception:
        """What a client is told, which is not what an exception in an engine says."""
        if isinstance(e, UnavailableError):
            return e
        logger.error("request %s failed: %s", self.request_id, e)
        told = UNUSABLE_PATCH if str(e).endswith(UNUSABLE_PATCH) else INTERNAL_ERROR
        return APIError(500, told, "internal_error")
