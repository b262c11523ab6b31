"""A stand-in for `AsyncLLM` that writes what it is told to, a token at a time."""

import asyncio
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nanovllm
from nanovllm.batch import EngineOutput, TextPayload, TokenScores
from nanovllm.cluster.stats import PoolStats
from nanovllm.config import EngineConfig
from nanovllm.errors import EngineDeadError, InvalidRequestError, OverloadedError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.frontend import TextFrontend
from nanovllm.text.input_processor import Prompt, TextInput

DEMO_MODEL = Path(nanovllm.__file__).parent / "demo_model"
EOS = 4093
OTHER = 1000
"""The token that is always likelier than the one that is taken."""


class FakeLLM:
    """Text in and out with the demo model's tokenizer; the tokens between are scripted.

    Args:
        reply: What every completion says before it ends.
        max_model_len: Longest prompt plus output.
        enable_lora: Whether adapters can be registered.

    Attributes:
        delay: Seconds a token takes.
        fail_after: Tokens after which a request fails with `failure`; None is never.
        failure: An exception that is raised, or the text of a completion's error.
        num_open: Requests that have not ended.
        most_open: The most of them so far.
        asked: What was to be sampled, before it was checked.
        submitted: What has been submitted, with its priority and salt.
        adapted: The adapter of each request, or None.
        loras: Directories of the adapters, by name.
    """

    def __init__(
        self,
        reply: str = " upon a time",
        max_model_len: int = 256,
        enable_lora: bool = False,
    ) -> None:
        self.config = EngineConfig(model="demo_model", enable_lora=enable_lora)
        self.model_id = "demo_model"
        self.max_model_len = max_model_len
        self.is_ready = True
        self.delay = 0.0
        self.fail_after: int | None = None
        self.failure: Exception | str = EngineDeadError("the engine died: try again")
        self.overloaded = False
        self.num_open = self.most_open = 0
        self.asked: list[SamplingParams] = []
        self.submitted: list[tuple[TextInput, int, str | None]] = []
        self.adapted: list[str | None] = []
        self.loras: dict[str, str] = {}
        self.frontend = TextFrontend(DEMO_MODEL, EngineConfig())
        self.tokenizer = self.frontend.tokenizer
        self.reply_ids = self.frontend.encode(reply)
        self.model_config = self.frontend.model_config
        self.processor = self.frontend.output_processor()
        self._inputs = self.frontend.input_processor(max_model_len)
        self._seq_ids = itertools.count()
        self._streams: dict[str, FakeStream] = {}

    def default_sampling_params(self) -> SamplingParams:
        return self.frontend.default_sampling_params()

    async def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self.frontend.render(messages, **options)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.frontend.encode(text, add_special_tokens)

    async def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.frontend.decode(token_ids, skip_special_tokens)

    def embedding_params(
        self, dimensions: int | None = None, truncate_prompt_tokens: int | None = None
    ) -> SamplingParams:
        return self.frontend.embedding_params(dimensions, truncate_prompt_tokens)

    async def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        embeds: bool = False,
    ) -> TextInput:
        self.asked.append(params)
        return self._inputs.process(prompt, params, add_special_tokens, embeds)

    async def submit(
        self,
        inputs: Sequence[TextInput],
        *,
        request_ids: Sequence[str],
        priority: int = 0,
        cache_salt: str | None = None,
        lora_name: str | None = None,
    ) -> "list[FakeStream]":
        if self.overloaded:
            raise OverloadedError("the queue is full: try again")
        self.submitted += [(item, priority, cache_salt) for item in inputs]
        self.adapted.append(lora_name)
        streams = []
        for name, item in zip(request_ids, inputs, strict=True):
            seq_ids = [next(self._seq_ids) for _ in range(item.params.n)]
            output = self.processor.add(
                name, seq_ids, item.prompt, item.token_ids, item.params, time.monotonic()
            )
            self._streams[name] = stream = FakeStream(self, item, seq_ids, output)
            streams.append(stream)
        self.num_open += len(streams)
        self.most_open = max(self.most_open, self.num_open)
        return streams

    async def abort(self, request_id: str) -> bool:
        stream = self._streams.get(request_id)
        if stream is None or stream.output.finished:
            return False
        self.processor.abort(request_id)
        return True

    async def register_lora(self, name: str, path: str) -> list[str]:
        if name in self.loras:
            raise InvalidRequestError(f"LoRA '{name}' is already registered", "name")
        if not os.path.isdir(path):  # false for a name that is too long
            raise InvalidRequestError(f"LoRA directory not found: {path}", "path")
        self.loras[name] = path
        return []

    async def unregister_lora(self, name: str) -> None:
        if name not in self.loras:
            raise InvalidRequestError(f"LoRA '{name}' is not registered", "lora_name")
        del self.loras[name]

    def list_loras(self) -> list[str]:
        return list(self.loras)

    def stats(self) -> PoolStats:
        return PoolStats("cache_aware", [], self.num_open, self.num_open, 0.0, 0.0)


class FakeStream:
    """Adds a token to each completion of a request whenever it is asked for news."""

    def __init__(
        self, llm: FakeLLM, item: TextInput, seq_ids: list[int], output: RequestOutput
    ) -> None:
        self.output = output
        self._llm, self._item, self._seq_ids = llm, item, seq_ids
        self._num_tokens = 0
        self._ended = False

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await asyncio.sleep(self._llm.delay)
        if not self.output.finished:
            self._step()
        if self.output.finished:
            await self.aclose()
        return self.output

    def abort(self) -> bool:
        """End the request; False if it has ended."""
        if self.output.finished:
            return False
        self._llm.processor.abort(self.output.request_id)
        return True

    def _step(self) -> None:
        llm, params = self._llm, self._item.params
        ids = [*llm.reply_ids, EOS]
        number, self._num_tokens = self._num_tokens, self._num_tokens + 1
        if number == llm.fail_after and isinstance(llm.failure, Exception):
            raise llm.failure
        failed = number == llm.fail_after
        token_id = ids[number % len(ids)]
        limit = params.max_tokens or llm.max_model_len
        reason = "length" if number + 1 >= limit else None
        if token_id in self._item.payload.eos_token_ids:
            reason = "stop"
        news = [
            EngineOutput(seq_id, None, None, "error", str(llm.failure))
            if failed
            else EngineOutput(seq_id, token_id, self._payload(number, token_id), reason, None, 2)
            for seq_id in self._seq_ids
        ]
        llm.processor.process(news)

    def _payload(self, number: int, token_id: int) -> TextPayload | None:
        params = self._item.params
        scores = None if params.logprobs is None else _scores(token_id, params.logprobs)
        if params.logprob_token_ids is not None:
            shares = [math.log(share_of(i)) for i in params.logprob_token_ids]
            scores = TokenScores([token_id, *params.logprob_token_ids], [-1.0, *shares], 1)
        prompt = None
        if params.prompt_logprobs is not None and number == 0:
            rest = [_scores(i, params.prompt_logprobs) for i in self._item.token_ids[1:]]
            prompt = [None, *rest]
        embedding = None
        if self._item.payload.embeds:
            embedding = state_of(self._item.token_ids, self._llm.model_config.hidden_size)
        return TextPayload(scores, prompt, embedding)

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._llm.num_open -= 1
            self._llm.processor.abort(self.output.request_id)


def share_of(token_id: int) -> float:
    """The probability of any token."""
    return (1 + token_id % 7) / 10_000


def state_of(token_ids: Sequence[int], size: int) -> bytes:
    """The hidden state that it makes of a prompt."""
    draw = np.random.default_rng(list(token_ids))
    return draw.normal(size=size).astype(np.float32).tobytes()


def _scores(token_id: int, num_top: int) -> TokenScores:
    """The token is second to another one."""
    top = [(OTHER, -0.5), (token_id, -1.0)][:num_top]
    return TokenScores([token_id, *(i for i, _ in top)], [-1.0, *(value for _, value in top)], 2)
