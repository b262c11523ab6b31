"""A long text spoken sentence by sentence, in one voice."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from nanovllm.audio.files import Samples
from nanovllm.audio.sentences import split_sentences, split_voice_design
from nanovllm.errors import ContextLengthError
from nanovllm.outputs import SpeechOutput
from nanovllm.speech_params import DEFAULT_MAX_PATCHES, SpeechParams
from nanovllm.speech_stream import SampleStream, SpeechStream

logger = logging.getLogger(__name__)

Begin = Callable[..., Awaitable[SpeechStream]]


class Sentences:
    """A text's sentences, each with what makes it sound like the others.

    All get the same prompt. Without one, the others continue the first one's speech, as OpenBMB's
    `merge_prompt_cache` does, so that the voice it happened to get is kept. Where that leaves a
    sentence too little of the context, `forget` has it begin anew, and those after it continue it.

    Args:
        text: What to say; in VoxCPM2 it may begin with the description of a voice in parentheses.
        params: How; each sentence has its own cap.
        options: The other arguments of `AsyncSpeech.generate` that all requests share; `voice` is
            not among them.
        has_design: Whether the model takes such a description.
    """

    def __init__(
        self, text: str, params: SpeechParams, options: dict[str, Any], has_design: bool
    ) -> None:
        # Blank text is refused as a request, not here.
        self._left = deque(split_sentences(text) or [text])
        self._params = params
        self._options = options
        self._learnt: dict[str, Any] = {}
        continues = options.get("prompt_latents") is not None
        # A reference only lends its voice: it does not take the place of a description.
        self.must_learn = not continues and options.get("ref_audio_latents") is None
        self._design = split_voice_design(text)[0] if has_design and not continues else ""
        self._has_design = has_design
        self._num_taken = 0

    def __len__(self) -> int:
        return len(self._left)

    @property
    def keeps_latents(self) -> bool:
        """Whether whoever asked for the speech wants its latents."""
        return bool(self._options.get("keep_latents"))

    def take(self) -> str:
        """The next sentence."""
        self._num_taken += 1
        return self._left.popleft()

    def request(self, sentence: str) -> dict[str, Any]:
        """The arguments of `AsyncSpeech.generate` for the sentence that was taken last."""
        if self._learnt:
            return {"text": sentence, **self._options, **self._learnt}
        text = sentence if self._num_taken == 1 else self._design + sentence
        learns = {"keep_latents": True} if self.must_learn else {}
        return {"text": text, "params": self._params, **self._options, **learns}

    def learn(self, output: SpeechOutput) -> None:
        """Let the sentences to come continue a sentence's speech, if they need it."""
        if not self.must_learn or not output.latents:
            return
        self.must_learn = False
        # With a cap of its own a sentence is refused, and not cut short, where it lacks room.
        longest = self._params.max_generate_length or DEFAULT_MAX_PATCHES
        self._learnt = {
            "params": replace(self._params, max_generate_length=longest),
            "prompt_latents": b"".join(output.latents),
            "prompt_text": split_voice_design(output.text)[1] if self._has_design else output.text,
        }

    def forget(self) -> bool:
        """Let the sentences to come begin anew; False if they continue nothing that was learnt."""
        if not self._learnt:
            return False
        self._learnt, self.must_learn = {}, True
        return True


class LongSpeech(SampleStream):
    """The speech of several sentences as one stream: float32 mono, a chunk a patch.

    A sentence is queued when the one before it has been generated, if not yet read; it can be
    refused, and that shows when its turn comes.

    Args:
        sentences: What to say.
        begin: Queues a request; `AsyncSpeech.generate`.
        last_begun: Called once nothing more will be queued.
    """

    def __init__(
        self, sentences: Sentences, begin: Begin, last_begun: Callable[[], None] = lambda: None
    ) -> None:
        self._sentences = sentences
        self._begin = begin
        self._last_begun = last_begun
        self._ended: list[SpeechOutput] = []
        self._current: SpeechStream | None = None
        self._next: asyncio.Task[SpeechStream] | None = None
        self._aborted = False
        self._closed = False

    async def start(self) -> None:
        """Queue the first sentence.

        Raises:
            InvalidRequestError: An argument cannot be used; the message says why.
            UnavailableError: The queue is full, or no engine runs; try again later.
        """
        try:
            self._current = await self._begin_next()
        except BaseException:
            self._end()
            raise

    @property
    def output(self) -> SpeechOutput:
        """The sentences so far as one output; its finish reason is that of the last one."""
        outputs = list(self._ended)
        if self._current is not None:
            outputs.append(self._current.output)
        first, last = outputs[0], outputs[-1]
        reason = last.finish_reason
        if self._aborted:
            reason = "abort"
        elif not self._closed and _is_whole(last) and (self._next or len(self._sentences)):
            reason = None
        return replace(
            last,
            text="".join(output.text for output in outputs),
            num_prompt_tokens=sum(output.num_prompt_tokens for output in outputs),
            num_target_tokens=sum(output.num_target_tokens for output in outputs),
            num_cached_tokens=sum(output.num_cached_tokens for output in outputs),
            metrics=replace(first.metrics, finished_time=last.metrics.finished_time),
            num_patches=sum(output.num_patches for output in outputs),
            num_samples=sum(output.num_samples for output in outputs),
            latents=_latents(outputs) if self._sentences.keeps_latents else None,
            finish_reason=reason,
        )

    async def __anext__(self) -> Samples:
        """Return the next patch's samples as soon as they are there; see `SpeechStream`."""
        while self._current is not None and not self._closed:
            try:
                chunk = await anext(self._current)
            except StopAsyncIteration:
                await self._turn()
                continue
            except Exception:
                self._end()
                raise
            self._look_ahead()
            return chunk
        raise StopAsyncIteration

    def abort(self) -> bool:
        """End it; what there is of the sentence can still be read. False if it has ended."""
        if self._current is None or self.output.finished:
            return False
        self._aborted = True
        self._last_begun()
        if self._next is not None:
            self._next.cancel()
            self._next.add_done_callback(_abort_unheard)
        self._current.abort()
        return True

    async def aclose(self) -> None:
        """Abort what has not ended, and begin nothing more."""
        self.abort()
        self._end()
        if self._current is not None:
            await self._current.aclose()

    def _end(self) -> None:
        self._closed = True
        self._last_begun()

    def _look_ahead(self) -> None:
        """Queue the next sentence once this one has been generated."""
        current = self._current
        if current is None or self._next is not None or self._aborted:
            return
        if not _is_whole(current.output) or not len(self._sentences):
            return
        self._sentences.learn(current.output)
        self._next = asyncio.ensure_future(self._begin_next())

    async def _turn(self) -> None:
        """Go on with the next sentence, if there is one and nobody ended this one."""
        self._look_ahead()
        if self._next is not None:
            # Not awaited itself: a reader that goes must not take the sentence along.
            await asyncio.wait((self._next,))
        if self._next is None or self._aborted or self._closed:
            self._end()
            return
        try:
            following = self._next.result()
        except BaseException:
            self._end()
            raise
        if self._current is not None:
            self._ended.append(self._current.output)
        self._current, self._next = following, None

    async def _begin_next(self) -> SpeechStream:
        sentences = self._sentences
        sentence = sentences.take()
        try:
            return await self._begin(**sentences.request(sentence))
        except ContextLengthError:
            if not sentences.forget():
                raise
            logger.warning(
                "a sentence of a long text begins with a voice of its own: the speech that it "
                "would continue leaves it too little of max_model_len"
            )
            return await self._begin(**sentences.request(sentence))
        finally:
            if not len(sentences):
                self._last_begun()


def _is_whole(output: SpeechOutput) -> bool:
    """Whether a sentence has been said as far as it goes, so that the next one may follow."""
    return output.finish_reason in ("stop", "length")


def _latents(outputs: list[SpeechOutput]) -> list[bytes]:
    return [latents for output in outputs for latents in output.latents or []]


def _abort_unheard(begun: asyncio.Task[SpeechStream]) -> None:
    """End a sentence that was queued for nobody; what it was refused for does not matter."""
    if not begun.cancelled() and begun.exception() is None:
        begun.result().abort()
