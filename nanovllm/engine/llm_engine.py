"""The engine: requests in, steps, news out."""

import logging
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nanovllm.batch import Batch, EngineOutput, Key, Runner
from nanovllm.engine.block_manager import root_hash
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.interrupts import interrupts_held_back, interrupts_let_in
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import conformed

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineStats:
    """What an engine has done so far and what it holds now; counters never go down.

    Args:
        num_running: Sequences in a slot.
        num_waiting: Sequences queued or preempted.
        num_paused: Sequences of both kinds that get no rows until they are resumed.
        num_kv_blocks: Blocks in the pool.
        num_used_blocks: Blocks that sequences hold.
        num_cached_blocks: Free blocks whose prefix can be reused.
        num_steps: Steps committed.
        num_prompt_tokens: Prompt positions of the sequences that started.
        num_cached_tokens: Of these, positions that came from the prefix cache.
        num_computed_tokens: Positions computed, recomputation included.
        num_output_tokens: Keys generated.
        num_forced_tokens: Of these, keys that a grammar forced: they took no step of their own.
        num_preemptions: Times a sequence lost its blocks to another.
        num_errors: Sequences that ended with an error.
        prefill_time: Seconds in steps with a row of more than one position.
        decode_time: Seconds in the other steps.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_paused: int = 0
    num_kv_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_forced_tokens: int = 0
    num_preemptions: int = 0
    num_errors: int = 0
    prefill_time: float = 0.0
    decode_time: float = 0.0


class _Launched(NamedTuple):
    """A step in flight and when it was launched."""

    batch: Batch
    handle: Any
    launch_time: float


class LLMEngine:
    """Drives one runner step by step.

    Args:
        runner: Computes the steps.
        scheduler: Fills them.
        max_model_len: Longest prompt plus output.
        model_id: What the KV cache belongs to; part of every block hash.
        async_scheduling: Whether a step is launched while the one before it still runs.
        seed: Seeds the requests that bring no seed.

    Raises:
        InvalidRequestError: `max_model_len` does not fit the KV cache.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        max_model_len: int,
        model_id: str = "",
        async_scheduling: bool = False,
        seed: int = 0,
    ) -> None:
        blocks = scheduler.block_manager
        if max_model_len > blocks.num_blocks * blocks.block_size:
            raise InvalidRequestError(
                f"max_model_len={max_model_len} does not fit a KV cache of {blocks.num_blocks} "
                f"blocks of {blocks.block_size} positions",
                "max_model_len",
            )
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self._runner = runner
        self._model_id = model_id
        self._max_in_flight = 1 if async_scheduling else 0
        self._seeds = random.Random(seed % 2**64)  # or -1 would be 1
        self._in_flight: deque[_Launched] = deque()
        self._unreported: list[EngineOutput] = []
        self._next_seq_id = 0
        self._last_collected = 0.0
        self._stats = EngineStats(num_kv_blocks=blocks.num_blocks)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._unreported)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: not while all that is unfinished is paused."""
        return bool(self._in_flight or self._unreported) or self.scheduler.has_runnable

    def add(
        self,
        keys: list[Key],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter_id: int | None = None,
        schedules_ahead: bool = True,
        payload: Any = None,
        first_seq_id: int | None = None,
    ) -> list[int]:
        """Queue a request.

        The output is clipped to what the context leaves after the prompt, but one key there always
        is: it takes no position.

        Args:
            keys: The prompt's keys.
            params: What to sample; `n` completions share the prompt's KV blocks.
            priority: Lower runs first.
            cache_salt: Requests share cached prefixes only with those of equal salt.
            adapter_id: LoRA adapter.
            schedules_ahead: Whether a step may be scheduled before the last result is known.
            payload: Handed to the runner when the sequences start.
            first_seq_id: Id of its first sequence, and the others follow; no open one has them.
                None counts on. Among equals in priority, lower ids run first.

        Returns:
            The ids of its sequences, one a completion.

        Raises:
            InvalidRequestError: The prompt is empty, or a value of another type.
            ContextLengthError: The prompt is longer than the context.
        """
        priority = conformed("priority", priority, int)
        cache_salt = conformed("cache_salt", cache_salt, str | None)
        self._check(keys, adapter_id)
        max_keys = max(self.max_model_len, len(keys) + 1)
        if params.max_tokens is not None:
            max_keys = min(max_keys, len(keys) + params.max_tokens)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed % 2**64
        first_seq_id = self._next_seq_id if first_seq_id is None else first_seq_id
        if any(self.scheduler.is_open(first_seq_id + index) for index in range(params.n)):
            raise ValueError(f"a sequence with an id from {first_seq_id} on is still open")
        sequences = [
            Sequence(
                first_seq_id + index,
                keys,
                params,
                max_keys,
                seed=seed,
                sample_index=index,
                priority=priority,
                adapter_id=adapter_id,
                root_hash=root_hash(self._model_id, adapter_id, cache_salt),
                # The scores of cached positions are gone; one completion recomputes them for all.
                reads_cache=params.prompt_logprobs is None or index > 0,
                schedules_ahead=schedules_ahead,
                payload=payload,
            )
            for index in range(params.n)
        ]
        self._queue(sequences)
        return [seq.seq_id for seq in sequences]

    def _check(self, keys: list[Key], adapter_id: int | None) -> None:
        if not keys:
            raise InvalidRequestError("the prompt is empty: give at least one token", "prompt")
        if len(keys) > self.max_model_len:
            raise ContextLengthError.of_prompt(self.max_model_len, len(keys))
        if adapter_id is not None and not self.scheduler.max_num_adapters:
            raise InvalidRequestError("this engine was started without LoRA adapters", "adapter_id")

    def _queue(self, sequences: list[Sequence]) -> None:
        if not self.scheduler.has_unfinished:
            # A step that is still in flight serves nobody: what passed since then was no work.
            self._last_collected = time.monotonic()
        with interrupts_held_back():
            self._next_seq_id = max(self._next_seq_id, sequences[-1].seq_id + 1)
            for seq in sequences:
                self.scheduler.add(seq)

    def abort(self, seq_id: int) -> EngineOutput | None:
        """End a sequence at any moment and free what it holds.

        Keys that a failed step left unreported are dropped: the outcome is the last news of it.

        Returns:
            Its outcome, or None if it had ended already.
        """
        with interrupts_held_back():
            output = self.scheduler.abort(seq_id)
            if output is not None and self._unreported:
                self._unreported = [news for news in self._unreported if news.seq_id != seq_id]
        return output

    def pause(self, seq_ids: Iterable[int], paused: bool) -> None:
        """Compute no more of these sequences, or go on with them.

        A paused sequence keeps what it holds until another needs it, and then recomputes that once
        it is resumed. News of steps in flight still come.
        """
        self.scheduler.pause(seq_ids, paused)

    def step(self) -> list[EngineOutput]:
        """Launch the next step, and collect the oldest one once enough are in flight.

        Ctrl-C interrupts the runner, and waits for the end of all else.

        Returns:
            News of every sequence that got a key or ended; often none while a step is in flight.

        Raises:
            BaseException: Whatever the runner raised, an interrupt included. The sequences of the
                failed step have ended with an error that the next call reports; the engine goes
                on with the others.
        """
        with interrupts_held_back():
            batch = self.scheduler.schedule()
            if batch is not None:
                self._launch(batch)
            if self._in_flight and (batch is None or len(self._in_flight) > self._max_in_flight):
                self._collect()
        outputs, self._unreported = self._unreported, []
        return outputs

    def stats(self) -> EngineStats:
        """The engine's counters as of now."""
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        return replace(
            self._stats,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_paused=scheduler.num_paused,
            num_used_blocks=blocks.num_blocks - blocks.num_free,
            num_cached_blocks=blocks.num_cached,
            num_prompt_tokens=scheduler.num_prompt_keys,
            num_cached_tokens=scheduler.num_cached_keys,
            num_forced_tokens=scheduler.num_forced_keys,
            num_preemptions=scheduler.num_preemptions,
        )

    def _launch(self, batch: Batch) -> None:
        launch_time = time.monotonic()
        try:
            with interrupts_let_in():
                handle = self._runner.launch(batch)
        except BaseException as e:  # Ctrl-C too: the scheduler must not wait for this step
            while self._in_flight:
                self._collect()
            self._fail(batch, e)
            raise
        self._in_flight.append(_Launched(batch, handle, launch_time))

    def _collect(self) -> None:
        batch, handle, launch_time = self._in_flight.popleft()
        try:
            with interrupts_let_in():
                results = self._runner.collect(handle)
        except BaseException as e:
            self._in_flight.clear()
            self._fail(batch, e)
            raise
        outputs = self.scheduler.commit(batch, results)
        now = time.monotonic()
        self._count(batch, outputs, now - max(launch_time, self._last_collected))
        self._last_collected = now
        self._unreported += outputs

    def _fail(self, batch: Batch, error: BaseException) -> None:
        outputs = self.scheduler.fail(batch, f"{type(error).__name__}: {error}")
        if isinstance(error, Exception):  # an interrupt is no failure to report
            logger.error("step %d failed and ended %d sequences", batch.step, len(outputs))
        self._stats.num_errors += len(outputs)
        self._unreported += outputs

    def _count(self, batch: Batch, outputs: list[EngineOutput], elapsed: float) -> None:
        stats = self._stats
        stats.num_steps += 1
        stats.num_computed_tokens += batch.num_positions
        if len(batch.slots) > batch.num_decodes:
            stats.prefill_time += elapsed
        else:
            stats.decode_time += elapsed
        for output in outputs:
            if output.key is not None:
                stats.num_output_tokens += 1
            elif output.finish_reason == "error":
                stats.num_errors += 1
