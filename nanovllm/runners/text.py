"""Text: positions hold token ids, the last one of a row yields a sampled id."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.batch import (
    LOST_GRAMMAR,
    UNUSABLE_LOGITS,
    Batch,
    SlotStart,
    StepResult,
    Stop,
    TextPayload,
    TextRequest,
    TokenScores,
)
from nanovllm.config import ResolvedConfig
from nanovllm.kernels.attention_backend import IntArray
from nanovllm.kernels.kernels import Kernels
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.sampler import Scores, sample, score_tokens
from nanovllm.models.decoder import CausalLM
from nanovllm.runners.captured_sampler import CapturedSampler, keep_tokens
from nanovllm.runners.decode_graphs import RowOutputs
from nanovllm.runners.graphs import Capture
from nanovllm.runners.model_runner import ModelRunner, StepRows
from nanovllm.runners.sampling_table import SamplingTable
from nanovllm.runners.transfers import HostCopies
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.grammar_compiler import GrammarCompiler

if TYPE_CHECKING:
    # What follows grammars is imported once there is one: all else does without its library.
    from nanovllm.runners.grammar import SlotGrammar

PROMPT_SCORE_ROWS = 128
"""Prompt positions scored at a time: bounds their logits to some 80 MB of a 150k vocabulary."""


@dataclass(slots=True)
class TextSlot:
    """What a running sequence owns besides its row in the tables."""

    params: SamplingParams
    num_prompt: int
    eos_token_ids: frozenset[int]
    scores_prompt: bool
    grammar: "SlotGrammar | None" = None
    prompt_scores: list[Scores] = field(default_factory=list)
    embedding: Tensor | None = None

    def take_prompt_scores(self) -> list[Scores] | None:
        """The scores of the prompt if they are due; they are once."""
        due, self.scores_prompt = self.scores_prompt, False
        return self.prompt_scores if due else None

    def take_embedding(self) -> Tensor | None:
        """The prompt's embedding if it has just been computed, float32 `[hidden_size]`."""
        taken, self.embedding = self.embedding, None
        return taken

    def stop_at(self, token_id: int) -> Stop | None:
        if token_id in self.eos_token_ids:
            return Stop("stop")
        if token_id in (self.params.stop_token_ids or ()):
            return Stop("stop", token_id)
        return None


class TextStep(NamedTuple):
    """A step in flight: the slots, ends and states of the rows that emit, and what came of them.

    Args:
        slots: Slot of each row.
        ends: Keys that each row's sequence had before.
        states: What each row's slot held.
        results: Sampled ids `[num_rows]`, -1 for unusable logits; then the scores of the tokens if
            a row asked for some, three arrays; then by rows those of prompts, three arrays each,
            and embeddings.
        has_scores: Whether there are scores of the tokens.
        num_prompt_scores: Slices of prompt scores of each row; None where none are due.
        embeds: Whether there is an embedding of each row.
    """

    slots: list[int]
    ends: list[int]
    states: list[TextSlot]
    results: HostCopies
    has_scores: bool
    num_prompt_scores: list[int | None]
    embeds: list[bool]


class TextRunner(ModelRunner[CausalLM]):
    """Feeds token ids and samples the next.

    The ids of a running sequence lie in a table on the device: a step reads its inputs from there
    and writes its samples there, so the next can start before the host has seen them.

    Args:
        model: The network.
        kernels: What it runs on.
        config: Options, resolved for the device.
        grammars: Compiles the forms of outputs.
        capture: See `ModelRunner`.
        parallel: See `ModelRunner`.
    """

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels,
        config: ResolvedConfig,
        grammars: GrammarCompiler,
        capture: Capture | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__(model, kernels, config, capture, parallel, model.sharding)
        self.grammars = grammars
        shape = self._num_slots + 1, self.max_model_len + 1
        self._token_ids = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._sampling = SamplingTable(self._num_slots, model.config.vocab_size, self.device)
        self._slots: dict[int, TextSlot] = {}
        self._embedding: set[int] = set()
        self._sampler: CapturedSampler | None = None
        if self._graphs is not None and capture is not None:
            (logits,) = self._graphs.outputs
            self._sampler = CapturedSampler(
                capture, self._graphs.sizes, logits, self._token_ids, kernels
            )

    def _capture(self) -> None:
        super()._capture()
        if self._sampler is not None:
            self._sampler.capture()

    def _start_slot(self, start: SlotStart) -> None:
        request = start.payload or TextRequest()
        params = start.sampling_params
        self._slots[start.slot] = TextSlot(
            params=params,
            num_prompt=start.num_prompt_keys,
            eos_token_ids=request.eos_token_ids,
            # One completion scores the prompt for all, and a resumed one has done so before.
            scores_prompt=params.prompt_logprobs is not None
            and start.sample_index == 0
            and len(start.keys) == start.num_prompt_keys,
        )
        self._embedding.discard(start.slot)
        if request.embeds:
            self._embedding.add(start.slot)
        keys = np.array(start.keys, dtype=np.int32)
        self._token_ids[start.slot, : len(keys)] = self._to_device(keys)
        self._sampling.start(start, request, self._start_grammar(start, request))

    def _start_grammar(self, start: SlotStart, request: TextRequest) -> Sequence[int]:
        """Set up the grammar of a sequence; returns ids that only it may still generate."""
        if request.grammar is None:
            return ()
        from nanovllm.runners.grammar import start_grammar

        self._slots[start.slot].grammar = start_grammar(
            start,
            request.grammar,
            request.matcher,
            self.grammars,
            # The first rank says that one takes too much time; the others cannot disagree.
            is_timed=self._parallel is None or self._parallel.rank == 0,
        )
        # What the model is not to end at may be all that the grammar allows.
        return (
            self.grammars.vocabulary.tokens.eos_tokens if start.sampling_params.ignore_eos else ()
        )

    def _release_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._embedding.discard(slot)
        self._sampling.release(slot)

    def _new_outputs(self, num_rows: int) -> RowOutputs:
        return (torch.zeros(num_rows, self.model.config.vocab_size, device=self.device),)

    def _num_captured(self, batch: Batch) -> int:
        num_captured = super()._num_captured(batch)
        # A graph leaves no hidden states, and the last position of a long prompt may be a decode.
        return num_captured if self._embedding.isdisjoint(batch.slots[:num_captured]) else 0

    def _compute(self, rows: StepRows, ctx: ForwardContext) -> RowOutputs | None:
        token_ids = self._token_ids[rows.token_slots, rows.positions]
        scores = any(self._slots[slot].scores_prompt for slot in rows.slots.tolist())
        wanted = None if scores else rows.wanted
        hidden: Tensor = self.model(token_ids.long(), rows.positions, ctx, wanted)
        if scores:
            self._score_prompts(hidden, rows)
            hidden = hidden if rows.wanted is None else hidden[rows.wanted]
        if not rows.emits.any():
            return None
        if self._embedding:
            for row, slot in enumerate(rows.slots[rows.emits].tolist()):
                if slot in self._embedding:
                    self._slots[slot].embedding = hidden[row].to(torch.float32, copy=True)
        return (self.model.compute_logits(hidden, ctx.kernels, ctx.parallel),)

    def _compute_decodes(self, slots: Tensor, positions: Tensor, ctx: ForwardContext) -> RowOutputs:
        token_ids = self._token_ids[slots, positions.clamp(min=0)]
        hidden: Tensor = self.model(token_ids.long(), positions, ctx)
        return (self.model.compute_logits(hidden, ctx.kernels, ctx.parallel),)

    def _tail(self, outputs: RowOutputs | None, slots: IntArray, ends: IntArray) -> TextStep | None:
        if outputs is None:
            return None
        states = [self._slots[slot] for slot in slots.tolist()]
        prompt_scores = [state.take_prompt_scores() for state in states]
        scores = None
        if (
            self._sampler is not None
            and len(slots) <= self._sampler.max_rows
            and self._sampling.only_draw(slots)
        ):
            where = {"slots": slots, "ends": ends}
            token_ids = self._sampler.sample(where | self._sampling.draws(slots, ends))
        else:
            token_ids, scores = self._sample(outputs[0], states, slots, ends)
        results = [token_ids, *(scores or ())]
        embeddings = [state.take_embedding() for state in states]
        for slices, embedding in zip(prompt_scores, embeddings, strict=True):
            results += itertools.chain.from_iterable(slices or ())
            if embedding is not None:
                results.append(embedding)
        return TextStep(
            slots.tolist(),
            ends.tolist(),
            states,
            HostCopies(results),
            scores is not None,
            [None if slices is None else len(slices) for slices in prompt_scores],
            [embedding is not None for embedding in embeddings],
        )

    def _sample(
        self, logits: Tensor, states: list[TextSlot], slots: IntArray, ends: IntArray
    ) -> tuple[Tensor, Scores | None]:
        """Sample rows of all kinds, and write the ids to where the next step reads them."""
        # On a GPU the forward pass still runs while the host looks at the grammars.
        allowed = self._allowed_tokens(states, logits.shape[-1])
        settings = self._sampling.batch(slots, ends, self._token_ids, allowed)
        choice, scores = sample(logits, settings, self.kernels)
        at = self._to_device(np.stack([slots, ends]))
        return keep_tokens(choice, self._token_ids, at[0], at[1]), scores

    def collect(self, handle: TextStep | None) -> list[StepResult]:
        """Wait for a step and return one result for each row that emits, in row order."""
        if handle is None:
            return []
        arrived = iter(handle.results.wait())
        token_ids = next(arrived).tolist()
        scores = _ScoreReader(arrived) if handle.has_scores else None
        results = []
        for row, (slot, state) in enumerate(zip(handle.slots, handle.states, strict=True)):
            token_id, params, payload = token_ids[row], state.params, None
            num_slices = handle.num_prompt_scores[row]
            slices = [_ScoreReader(arrived) for _ in range(num_slices or 0)]
            embedding = next(arrived).tobytes() if handle.embeds[row] else None
            if token_id < 0:
                results.append(StepResult(slot, -1, Stop("error", UNUSABLE_LOGITS)))
                continue
            num_logprobs = params.num_logprobs
            if num_logprobs is not None or num_slices is not None or embedding is not None:
                payload = TextPayload(
                    None
                    if num_logprobs is None or scores is None
                    else scores.row(row, num_logprobs),
                    None if num_slices is None else _prompt_scores(slices, params.prompt_logprobs),
                    embedding,
                )
            forced: list[int] = []
            stop = state.stop_at(token_id) if embedding is None else Stop("stop")
            if state.grammar is not None:
                stop, forced = _follow(state.grammar, token_id, stop)
                self._write(slot, state, handle.ends[row] + 1, forced)
            results.append(StepResult(slot, token_id, stop, payload, forced))
        return results

    def _allowed_tokens(
        self, states: list[TextSlot], vocab_size: int
    ) -> tuple[Tensor, Tensor] | None:
        """Which rows have a grammar, and the ids it allows; None if no row has one."""
        grammars = [state.grammar for state in states]
        if not any(grammars):
            return None
        from nanovllm.runners.grammar import allowed_tokens

        return allowed_tokens(grammars, vocab_size, self.device)

    def _write(self, slot: int, state: TextSlot, start: int, token_ids: list[int]) -> None:
        """Put known ids where later steps read them, unless the slot is another's by now."""
        if token_ids and self._slots.get(slot) is state:
            fitting = token_ids[: self._token_ids.shape[1] - start]
            self._token_ids[slot, start : start + len(fitting)] = self._to_device(
                np.array(fitting, dtype=np.int32)
            )

    def _score_prompts(self, hidden: Tensor, rows: StepRows) -> None:
        """Score the prompt tokens that this step's positions predict, slice by slice."""
        first = 0
        columns = (column.tolist() for column in (rows.slots, rows.ends, rows.last_tokens))
        for slot, end, last in zip(*columns, strict=True):
            state = self._slots[slot]
            start = end - (last + 1 - first)
            first, offset = last + 1, first - start  # token = offset + position
            if not state.scores_prompt:
                continue
            for low in range(start, min(end, state.num_prompt - 1), PROMPT_SCORE_ROWS):
                high = min(low + PROMPT_SCORE_ROWS, end, state.num_prompt - 1)
                scored = hidden[offset + low : offset + high]
                logits = self.model.compute_logits(scored, self.kernels, self._parallel)
                targets = self._token_ids[slot, low + 1 : high + 1].long()
                log_probs = logits.log_softmax(-1)
                num_top = state.params.prompt_logprobs or 0
                state.prompt_scores.append(score_tokens(log_probs, targets, num_top))


def _follow(
    grammar: "SlotGrammar", token_id: int, stop: Stop | None
) -> tuple[Stop | None, list[int]]:
    """Go on in a grammar; returns whether the sequence ends, and the tokens that are forced."""
    forced = grammar.take(token_id)
    if forced is None:
        return Stop("error", LOST_GRAMMAR), []
    if grammar.ended:
        stop = stop or Stop("stop", keeps_key=True)
    elif stop is not None and stop.detail is None:
        stop = None  # an end-of-text id that is text, too, and was taken for that
    return stop, forced


class _ScoreReader:
    """Scores on the host, the next three of the arrays that have arrived."""

    def __init__(self, arrived: Iterator[npt.NDArray[Any]]) -> None:
        self._token_ids, self._logprobs, self._ranks = (
            array.tolist() for array in itertools.islice(arrived, 3)
        )

    def row(self, row: int, num_top: int) -> TokenScores:
        width = 1 + num_top
        return TokenScores(
            self._token_ids[row][:width], self._logprobs[row][:width], self._ranks[row]
        )

    def __len__(self) -> int:
        return len(self._ranks)


def _prompt_scores(slices: list[_ScoreReader], num_top: int | None) -> list[TokenScores | None]:
    """The scores of a whole prompt; its first token has none."""
    rows = [reader.row(row, num_top or 0) for reader in slices for row in range(len(reader))]
    return [None, *rows]
