"""Text: positions hold token ids, the last one of a row yields a sampled id."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanovllm.batch import (
    LOST_GRAMMAR,
    UNUSABLE_LOGITS,
    SlotStart,
    StepResult,
    Stop,
    TextPayload,
    TextRequest,
    TokenScores,
)
from nanovllm.config import EngineConfig
from nanovllm.kernels.kernels import Kernels
from nanovllm.layers.context import ForwardContext
from nanovllm.layers.sampler import Sampled, Scores, sample, score_tokens
from nanovllm.models.decoder import CausalLM
from nanovllm.runners.model_runner import ModelRunner, StepRows
from nanovllm.runners.sampling_table import SamplingTable
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

    def stop_at(self, token_id: int) -> Stop | None:
        if token_id in self.eos_token_ids:
            return Stop("stop")
        if token_id in (self.params.stop_token_ids or ()):
            return Stop("stop", token_id)
        return None


class TextStep(NamedTuple):
    """A step in flight: the emitting rows' slots, ends and states, and what was sampled."""

    slots: list[int]
    ends: list[int]
    states: list[TextSlot]
    prompt_scores: list[list[Scores] | None]
    sampled: Sampled | None


class TextRunner(ModelRunner[CausalLM, Tensor]):
    """Feeds token ids and samples the next.

    The ids of a running sequence lie in a table on the device: a step reads its inputs from there
    and writes its samples there, so the next can start before the host has seen them.

    Args:
        model: The network.
        kernels: What it runs on.
        config: Options, resolved for the device.
        grammars: Compiles the forms of outputs; without one there are none.
    """

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels,
        config: EngineConfig,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        super().__init__(model, kernels, config)
        self.grammars = grammars
        num_slots = config.max_num_seqs or 1
        self._token_ids = torch.zeros(
            num_slots, self.max_model_len + 1, dtype=torch.int32, device=self.device
        )
        self._sampling = SamplingTable(num_slots, model.config.vocab_size, self.device)
        self._slots: dict[int, TextSlot] = {}

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
        self._token_ids[start.slot, : len(start.keys)] = torch.tensor(
            start.keys, dtype=torch.int32, device=self.device
        )
        self._sampling.start(start, request, self._start_grammar(start, request))

    def _start_grammar(self, start: SlotStart, request: TextRequest) -> Sequence[int]:
        """Set up the grammar of a sequence; returns ids that only it may still generate."""
        if request.grammar is None:
            return ()
        if self.grammars is None:
            raise RuntimeError("this runner was built without grammars")
        from nanovllm.runners.grammar import start_grammar

        self._slots[start.slot].grammar = start_grammar(start, request, self.grammars)
        # What the model is not to end at may be all that the grammar allows.
        return (
            self.grammars.vocabulary.tokens.eos_tokens if start.sampling_params.ignore_eos else ()
        )

    def _release_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._sampling.release(slot)

    def _forward(self, rows: StepRows, ctx: ForwardContext) -> Tensor:
        token_ids = self._token_ids[rows.token_slots, rows.positions]
        hidden: Tensor = self.model(token_ids.long(), rows.positions, ctx)
        return hidden

    def _tail(self, hidden: Tensor, rows: StepRows, ctx: ForwardContext) -> TextStep:
        self._score_prompts(hidden, rows)
        slots, ends = rows.slots[rows.emits], rows.ends[rows.emits]
        states = [self._slots[slot] for slot in slots.tolist()]
        prompt_scores = [state.prompt_scores if state.scores_prompt else None for state in states]
        for state in states:
            state.scores_prompt = False
        sampled = None
        if len(slots):
            last = hidden[self._to_device(rows.last_tokens[rows.emits])]
            logits = self.model.compute_logits(last, ctx.kernels)
            # On a GPU the forward pass still runs while the host looks at the grammars.
            allowed = self._allowed_tokens(states, logits.shape[-1])
            settings = self._sampling.batch(slots, ends, self._token_ids, allowed)
            sampled = sample(logits, settings, ctx.kernels)
            # An invalid row's sequence ends when the step is collected; until then any id will do.
            written = torch.where(sampled.valid, sampled.token_ids, 0).to(torch.int32)
            self._token_ids[self._to_device(slots), self._to_device(ends)] = written
        return TextStep(slots.tolist(), ends.tolist(), states, prompt_scores, sampled)

    def collect(self, handle: TextStep) -> list[StepResult]:
        """Wait for a step and return one result for each row that emits, in row order."""
        if handle.sampled is None:
            return []
        token_ids = handle.sampled.token_ids.tolist()
        valid = handle.sampled.valid.tolist()
        scores = _ScoreReader(handle.sampled.scores)
        results = []
        for row, (slot, state) in enumerate(zip(handle.slots, handle.states, strict=True)):
            if not valid[row]:
                results.append(StepResult(slot, -1, Stop("error", UNUSABLE_LOGITS)))
                continue
            token_id, params, payload = token_ids[row], state.params, None
            if params.logprobs is not None or handle.prompt_scores[row] is not None:
                payload = TextPayload(
                    None if params.logprobs is None else scores.row(row, params.logprobs),
                    _prompt_scores(handle.prompt_scores[row], params.prompt_logprobs),
                )
            forced: list[int] = []
            stop = state.stop_at(token_id)
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
            self._token_ids[slot, start : start + len(fitting)] = torch.tensor(
                fitting, dtype=torch.int32, device=self.device
            )

    def _score_prompts(self, hidden: Tensor, rows: StepRows) -> None:
        """Score the prompt tokens that this step's positions predict, slice by slice."""
        slots = rows.slots.tolist()
        if not any(self._slots[slot].scores_prompt for slot in slots):
            return
        first = 0
        ends, lasts = rows.ends.tolist(), rows.last_tokens.tolist()
        for slot, end, last in zip(slots, ends, lasts, strict=True):
            state = self._slots[slot]
            start = end - (last + 1 - first)
            first, offset = last + 1, first - start  # token = offset + position
            if not state.scores_prompt:
                continue
            for low in range(start, min(end, state.num_prompt - 1), PROMPT_SCORE_ROWS):
                high = min(low + PROMPT_SCORE_ROWS, end, state.num_prompt - 1)
                scored = hidden[offset + low : offset + high]
                logits = self.model.compute_logits(scored, self.kernels)
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
    """Scores brought to the host once a step."""

    def __init__(self, scores: Scores | None) -> None:
        if scores is not None:
            self._token_ids = scores.token_ids.tolist()
            self._logprobs = scores.logprobs.tolist()
            self._ranks = scores.ranks.tolist()

    def row(self, row: int, num_top: int) -> TokenScores:
        width = 1 + num_top
        return TokenScores(
            self._token_ids[row][:width], self._logprobs[row][:width], self._ranks[row]
        )

    def __len__(self) -> int:
        return len(self._ranks)


def _prompt_scores(
    slices: list[Scores] | None, num_top: int | None
) -> list[TokenScores | None] | None:
    """The scores of a whole prompt, if they were asked for; its first token has none."""
    if slices is None:
        return None
    readers = [_ScoreReader(scores) for scores in slices]
    rows = [reader.row(row, num_top or 0) for reader in readers for row in range(len(reader))]
    return [None, *rows]
