"""From an engine's keys to a user's outputs: text, stop strings, log probabilities."""

import time
from collections.abc import Iterable

from nanovllm.batch import EngineOutput, TextPayload, TokenScores
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Detokenizer, Tokenizer


class OutputProcessor:
    """The open requests and what has come of each so far.

    A `RequestOutput` is live: the one that `add` returns is the one that `process` brings up to
    date, until it is finished.

    Args:
        tokenizer: Decodes the ids; without one, outputs have ids and no text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: str,
        seq_ids: list[int],
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_time: float,
    ) -> RequestOutput:
        """Open a request.

        Args:
            request_id: Names it; not that of another open request.
            seq_ids: The engine's sequences, one for each completion, in the order of their index.
            prompt: Text of the prompt, if it was given as text.
            prompt_token_ids: Ids of the prompt.
            params: What was asked for.
            arrival_time: When it came, as `time.monotonic()`.

        Raises:
            InvalidRequestError: The id is taken, or there are stop strings and no tokenizer.
        """
        if request_id in self._requests:
            raise InvalidRequestError(
                f"a request with the id {request_id!r} is still running", "request_id"
            )
        if params.stop_strings and self._tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer", "stop")
        scored = params.num_logprobs is not None
        completions = [
            CompletionOutput(
                index,
                cumulative_logprob=0.0 if scored else None,
                logprobs=[] if scored else None,
            )
            for index in range(len(seq_ids))
        ]
        output = RequestOutput(
            request_id, prompt, prompt_token_ids, completions, RequestMetrics(arrival_time)
        )
        tokenizer = self._tokenizer if params.detokenize else None
        request = _Request(output, seq_ids, params, tokenizer)
        self._requests[request_id] = request
        for seq_id, completion in zip(seq_ids, completions, strict=True):
            self._sequences[seq_id] = _Sequence(request, completion)
        return output

    def process(self, outputs: Iterable[EngineOutput]) -> tuple[list[RequestOutput], list[int]]:
        """Take in the news of a step.

        News of sequences that have ended, or that were never added, is ignored.

        Returns:
            The requests there is news of, each once, and the sequences that reached a stop string,
            which the engine does not know of: the caller aborts them there.
        """
        now = time.monotonic()
        touched: dict[str, RequestOutput] = {}
        to_abort: list[int] = []
        for news in outputs:
            sequence = self._sequences.get(news.seq_id)
            if sequence is None:
                continue
            output = sequence.request.output
            touched[output.request_id] = output
            if sequence.take(news, now):
                if news.finish_reason is None:
                    to_abort.append(news.seq_id)
                del self._sequences[news.seq_id]
                self._forget_if_finished(output, now)
        return list(touched.values()), to_abort

    def abort(self, request_id: str) -> list[int]:
        """End a request with finish reason "abort" and forget it.

        Returns:
            Its unfinished sequences, for the caller to abort in the engine; none if the request
            has ended already.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        unfinished = [seq_id for seq_id in request.seq_ids if seq_id in self._sequences]
        for seq_id in unfinished:
            self._sequences.pop(seq_id).finish("abort", None)
        self._forget_if_finished(request.output, time.monotonic())
        return unfinished

    def _forget_if_finished(self, output: RequestOutput, now: float) -> None:
        if output.finished:
            output.metrics.finished_time = now
            del self._requests[output.request_id]


class _Request:
    """What the sequences of a request have in common."""

    __slots__ = ("output", "params", "seq_ids", "stops", "tokenizer")

    def __init__(
        self,
        output: RequestOutput,
        seq_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.output = output
        self.seq_ids = seq_ids
        self.params = params
        self.tokenizer = tokenizer
        self.stops = StopStrings(params.stop_strings) if params.stop_strings else None


class _Sequence:
    """One completion on its way."""

    __slots__ = ("completion", "detokenizer", "request", "stop", "unseen")

    def __init__(self, request: _Request, completion: CompletionOutput) -> None:
        params = request.params
        self.request = request
        self.completion = completion
        self.unseen = True
        self.detokenizer = (
            None
            if request.tokenizer is None
            else Detokenizer(
                request.tokenizer,
                request.output.prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
        )
        self.stop = (
            None
            if request.stops is None
            else StopSearch(request.stops, params.include_stop_str_in_output)
        )

    def take(self, news: EngineOutput, now: float) -> bool:
        """Take in one piece of news and return whether the sequence has ended."""
        if self.unseen:
            self._take_first(news, now)
        completion = self.completion
        key, finish_reason = news.key, news.finish_reason
        if isinstance(news.payload, TextPayload) and news.payload.embedding is not None:
            self.request.output.embedding = news.payload.embedding
        elif isinstance(key, int):
            completion.token_ids.append(key)
            if isinstance(news.payload, TextPayload):
                self._take_payload(news.payload)
            # The id that ends a text is not part of it, unless what ends it is asked for.
            silent = finish_reason == "stop" and not self.request.params.include_stop_str_in_output
            if self.detokenizer is not None and not silent:
                text = self.detokenizer.push(key)
                if self.stop is None:
                    if text:
                        completion.text += text
                elif text and (stop_string := self._take_stoppable(self.stop, text)) is not None:
                    completion.finish_reason, completion.stop_reason = "stop", stop_string
                    return True
        if finish_reason is None:
            return False
        self.finish(finish_reason, news.stop_reason)
        return True

    def finish(self, reason: str, detail: int | str | None) -> None:
        """End the completion, with the text that could have become a stop string."""
        if self.stop is not None:
            self.completion.text += self.stop.flush()
        self.completion.finish_reason, self.completion.stop_reason = reason, detail

    def _take_first(self, news: EngineOutput, now: float) -> None:
        output = self.request.output
        metrics = output.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = news.scheduled_time
        if news.key is None:
            return
        self.unseen = False
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        if self.completion.index == 0:
            output.num_cached_tokens = news.num_cached

    def _take_stoppable(self, stop: "StopSearch", text: str) -> str | None:
        """Add text up to where a stop string may begin; return the one that it reached."""
        allowed = len(self.completion.token_ids) > self.request.params.min_tokens
        shown, stop_string = stop.push(text, allowed)
        if shown:
            self.completion.text += shown
        return stop_string

    def _take_payload(self, payload: TextPayload) -> None:
        request, completion = self.request, self.completion
        scores, prompt_scores, _ = payload
        if scores is not None and completion.logprobs is not None:
            ranked = request.params.logprob_token_ids is None
            completion.logprobs.append(_logprobs(scores, request.tokenizer, ranked))
            total = completion.cumulative_logprob or 0.0
            completion.cumulative_logprob = total + scores.logprobs[0]
        if prompt_scores is not None and request.output.prompt_logprobs is None:
            request.output.prompt_logprobs = [
                None if entry is None else _logprobs(entry, request.tokenizer)
                for entry in prompt_scores
            ]


class StopStrings:
    """Stop strings and all their beginnings, for the completions of a request to share.

    Args:
        strings: The stop strings, none of them empty.
    """

    __slots__ = ("_beginnings", "_last_characters", "_longest", "_strings")

    def __init__(self, strings: list[str]) -> None:
        self._strings = strings
        self._beginnings = {text[:end] for text in strings for end in range(1, len(text))}
        self._last_characters = {beginning[-1] for beginning in self._beginnings}
        self._longest = max(map(len, strings)) - 1

    def find(self, window: str, num_old: int) -> tuple[int, str] | None:
        """Return the first stop string that ends behind the old characters, and where it begins."""
        first: tuple[int, str] | None = None
        for string in self._strings:
            start = window.find(string, max(0, num_old + 1 - len(string)))
            if start >= 0 and (first is None or start < first[0]):
                first = start, string
        return first

    def beginning_at_end_of(self, window: str) -> str:
        """Return the longest beginning of a stop string that a text ends in, or ""."""
        if window[-1] not in self._last_characters:
            return ""
        for size in range(min(self._longest, len(window)), 0, -1):
            if window[-size:] in self._beginnings:
                return window[-size:]
        return ""


class StopSearch:
    """Finds the first stop string in a text that arrives in pieces.

    Text is held back while it is the beginning of a stop string, and no longer. So an occurrence
    that a new piece completes always begins in what is held back, and nothing else is searched.

    Args:
        stops: What to look for.
        include: Whether the text keeps the one that ends it; then nothing is held back from it.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: StopStrings, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Take the next piece of text.

        Args:
            text: The piece.
            may_stop: Whether a stop string may end in it; those that do otherwise never count.

        Returns:
            The text to show, and the stop string that ends it, if there is one. Of several, the one
            that begins first counts, of those the one listed first.
        """
        num_held = len(self._held)
        num_shown = num_held if self._include else 0
        window = self._held + text
        if may_stop and (found := self._stops.find(window, num_held)) is not None:
            start, string = found
            self._held = ""
            return window[num_shown : start + len(string) * self._include], string
        self._held = self._stops.beginning_at_end_of(window)
        return window[num_shown : len(window) - len(self._held) * (not self._include)], None

    def flush(self) -> str:
        """Return what is held back, as no more text comes."""
        held, self._held = self._held, ""
        return "" if self._include else held


def _logprobs(
    scores: TokenScores, tokenizer: Tokenizer | None, ranked: bool = True
) -> TokenLogprobs:
    """Build the log probabilities of one position: the actual token first, then the best ones.

    If they are not `ranked`, they are others that were asked for.
    """
    text_of = (lambda _: None) if tokenizer is None else tokenizer.token_text
    token_ids, values, rank = scores
    logprobs = {token_ids[0]: Logprob(values[0], rank, text_of(token_ids[0]))}
    for rank, (token_id, value) in enumerate(zip(token_ids[1:], values[1:], strict=True), 1):
        if token_id not in logprobs:
            logprobs[token_id] = Logprob(value, rank if ranked else None, text_of(token_id))
    return logprobs
