"""The sampling settings of the running sequences, by slot."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.batch import SlotStart, TextRequest
from nanovllm.kernels.attention_backend import IntArray, to_device
from nanovllm.kernels.kernels import Draws, Penalties
from nanovllm.layers.sampler import BadWords, SamplingBatch
from nanovllm.runners.random_draws import uniforms
from nanovllm.sampling_params import SamplingParams

MAX_POSITION = 2**62
"""Stands for every number of tokens that no context reaches."""
MAX_TEMPERATURE = 1e10
REPETITION_RANGE = (1e-10, 1e10)
MAX_BIAS = 1e20
"""More makes no difference to what is drawn, and a logit that is multiplied by all of them and
divided by the least temperature is still a float32."""

BoolArray = npt.NDArray[np.bool_]


class SamplingTable:
    """Settings in arrays indexed by slot, so that a step's are gathered without a loop over rows.

    Args:
        num_slots: Slots of the engine.
        vocab_size: Width of the logits.
        device: Where logits are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._numbers = np.zeros(
            num_slots,
            dtype=[
                ("temperature", np.float32),
                ("top_k", np.int64),
                ("top_p", np.float32),
                ("min_p", np.float32),
                ("repetition", np.float32),
                ("presence", np.float32),
                ("frequency", np.float32),
                ("seed", np.uint64),
                ("sample_index", np.uint64),
                ("num_prompt", np.int64),
                ("min_tokens", np.int64),
                ("num_scores", np.int64),
            ],
        )
        # Slots whose logits are changed, masked or scored before a token is drawn from them.
        self._does_more = np.zeros(num_slots, dtype=np.bool_)
        self._stop_ids: dict[int, IntArray] = {}
        self._biases: dict[int, tuple[IntArray, npt.NDArray[np.float32]]] = {}
        self._allowed: dict[int, Tensor] = {}
        self._scored: dict[int, list[int]] = {}
        self._bad_words: dict[int, tuple[IntArray, IntArray]] = {}

    def start(self, start: SlotStart, request: TextRequest, forbidden: Sequence[int] = ()) -> None:
        """Take over the settings of the sequence that starts in a slot.

        Args:
            start: The sequence.
            request: What a text runner knows of it besides.
            forbidden: Ids that it must not generate if there are others.
        """
        slot, params = start.slot, start.sampling_params
        self.release(slot)
        self._numbers[slot] = (
            0.0 if params.greedy else min(params.temperature, MAX_TEMPERATURE),
            min(params.top_k, self._vocab_size) if params.top_k > 0 else self._vocab_size,
            params.top_p,
            params.min_p,
            np.clip(params.repetition_penalty, *REPETITION_RANGE),
            params.presence_penalty,
            params.frequency_penalty,
            start.seed,
            start.sample_index,
            start.num_prompt_keys,
            min(params.min_tokens, MAX_POSITION),
            _num_likeliest(params),
        )
        if params.min_tokens:
            stops = request.eos_token_ids | set(params.stop_token_ids or ())
            self._stop_ids[slot] = np.array(sorted(stops), dtype=np.int64)
        if params.logit_bias or forbidden:
            given = params.logit_bias or {}
            self._biases[slot] = (
                np.array([*given.keys(), *forbidden], dtype=np.int64),
                np.array(
                    [*np.clip([*given.values()], -MAX_BIAS, MAX_BIAS), *[-np.inf] * len(forbidden)],
                    dtype=np.float32,
                ),
            )
        if params.allowed_token_ids is not None:
            allowed = np.zeros(self._vocab_size, dtype=np.bool_)
            allowed[params.allowed_token_ids] = True
            self._allowed[slot] = self._to_device(allowed)
        if params.logprob_token_ids is not None:
            self._scored[slot] = params.logprob_token_ids
        if request.bad_words:
            self._bad_words[slot] = _in_arrays(request.bad_words)
        row = self._numbers[slot]
        self._does_more[slot] = (
            request.grammar is not None
            or row["num_scores"] >= 0
            or bool(_penalised(row))
            or any(slot in table for table in self._tables)
        )

    def release(self, slot: int) -> None:
        """Forget a slot's settings."""
        for table in self._tables:
            table.pop(slot, None)

    @property
    def _tables(self) -> tuple[dict[int, Any], ...]:
        return self._stop_ids, self._biases, self._allowed, self._scored, self._bad_words

    def only_draw(self, slots: IntArray) -> bool:
        """Whether rows `[num_rows]` need no more than `draws`: no masks, penalties or scores."""
        return not self._does_more[slots].any()

    def draws(self, slots: IntArray, ends: IntArray) -> dict[str, npt.NDArray[Any]]:
        """What `Draws` holds of rows, each `[num_rows]`; see `batch`."""
        numbers = self._numbers[slots]
        generated = (ends - numbers["num_prompt"]).astype(np.uint64)
        return {
            "temperature": numbers["temperature"],
            "uniforms": uniforms(numbers["seed"], numbers["sample_index"], generated),
            "top_k": numbers["top_k"],
            "top_p": numbers["top_p"],
            "min_p": numbers["min_p"],
        }

    def batch(
        self,
        slots: IntArray,
        ends: IntArray,
        token_ids: Tensor,
        grammar: tuple[Tensor, Tensor] | None = None,
    ) -> SamplingBatch:
        """Gather the settings of rows.

        Args:
            slots: Slot of each row, `[num_rows]`.
            ends: Number of keys each row's sequence has before this sample, `[num_rows]`.
            token_ids: Keys by slot and position, on the device.
            grammar: See `SamplingBatch`.
        """
        numbers = self._numbers[slots]
        generated = ends - numbers["num_prompt"]
        sampled = numbers["temperature"] > 0
        cut = sampled & ((numbers["top_k"] < self._vocab_size) | (numbers["top_p"] < 1))
        num_scores = int(numbers["num_scores"].max())
        draws = self.draws(slots, ends)
        return SamplingBatch(
            draws=Draws(
                temperature=self._to_device(draws["temperature"]),
                uniforms=self._to_device(draws["uniforms"]),
                any_sampled=bool(sampled.any()),
                top_k=self._to_device(draws["top_k"]) if cut.any() else None,
                top_p=self._to_device(draws["top_p"]) if cut.any() else None,
                min_p=self._to_device(draws["min_p"]) if draws["min_p"].any() else None,
            ),
            penalties=self._penalties(numbers, slots, ends, token_ids),
            bad_words=self._words(slots, ends, generated, token_ids),
            allowed=self._allowed_rows(slots),
            biases=self._bias_rows(slots, generated < numbers["min_tokens"]),
            grammar=grammar,
            num_scores=num_scores if num_scores >= 0 else None,
            scored=self._scored_rows(slots),
        )

    def _penalties(
        self, numbers: npt.NDArray[np.void], slots: IntArray, ends: IntArray, token_ids: Tensor
    ) -> Penalties | None:
        (rows,) = _penalised(numbers).nonzero()
        if not len(rows):
            return None
        return Penalties(
            rows=self._to_device(rows),
            history=token_ids[self._to_device(slots[rows]), : int(ends[rows].max())],
            lengths=self._to_device(ends[rows]),
            prompt_lengths=self._to_device(numbers["num_prompt"][rows]),
            repetition=self._to_device(numbers["repetition"][rows]),
            presence=self._to_device(numbers["presence"][rows]),
            frequency=self._to_device(numbers["frequency"][rows]),
        )

    def _words(
        self, slots: IntArray, ends: IntArray, generated: IntArray, token_ids: Tensor
    ) -> BadWords | None:
        having = self._rows_in(self._bad_words, slots)
        if not having:
            return None
        words = [self._bad_words[int(slots[row])] for row in having]
        rows = np.repeat(having, [len(last_ids) for last_ids, _ in words])
        width = max(before.shape[1] for _, before in words)
        prefixes = np.concatenate(
            [
                np.pad(before, ((0, 0), (width - before.shape[1], 0)), constant_values=-1)
                for _, before in words
            ]
        )
        back = np.arange(width, 0, -1)  # the last id is 1 back
        positions = self._to_device((ends[rows, None] - back).clip(0))
        tails = token_ids[self._to_device(slots[rows])[:, None], positions]
        in_output = self._to_device(back <= generated[rows, None])
        return BadWords(
            rows=self._to_device(rows),
            last_ids=self._to_device(np.concatenate([last_ids for last_ids, _ in words])),
            prefixes=self._to_device(prefixes),
            tails=torch.where(in_output, tails, -2),
        )

    def _allowed_rows(self, slots: IntArray) -> tuple[Tensor, Tensor] | None:
        rows = self._rows_in(self._allowed, slots)
        if not rows:
            return None
        allowed = torch.stack([self._allowed[int(slots[row])] for row in rows])
        return self._to_device(np.array(rows)), allowed

    def _scored_rows(self, slots: IntArray) -> tuple[Tensor, Tensor] | None:
        rows = self._rows_in(self._scored, slots)
        if not rows:
            return None
        ids = [self._scored[int(slots[row])] for row in rows]
        width = max(map(len, ids))
        # A row of fewer ids repeats one: of what is scored it reads no more than it asked for.
        padded = np.array([some + some[:1] * (width - len(some)) for some in ids], dtype=np.int64)
        return self._to_device(np.array(rows)), self._to_device(padded)

    def _bias_rows(
        self, slots: IntArray, too_short: BoolArray
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, ids and values of logit biases, and of the stops that min_tokens forbids."""
        entries = [
            (row, *self._biases[int(slots[row])]) for row in self._rows_in(self._biases, slots)
        ]
        for row in self._rows_in(self._stop_ids, slots):
            if too_short[row]:
                ids = self._stop_ids[int(slots[row])]
                entries.append((row, ids, np.full(len(ids), -np.inf, dtype=np.float32)))
        if not entries:
            return None
        rows = np.repeat([row for row, _, _ in entries], [len(ids) for _, ids, _ in entries])
        return (
            self._to_device(rows),
            self._to_device(np.concatenate([ids for _, ids, _ in entries])),
            self._to_device(np.concatenate([values for _, _, values in entries])),
        )

    def _rows_in(self, table: Iterable[int], slots: IntArray) -> list[int]:
        """The rows whose slot is in a table, most often none."""
        if not table:
            return []
        return [row for row, slot in enumerate(slots.tolist()) if slot in table]

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)


def _in_arrays(words: Sequence[tuple[int, ...]]) -> tuple[IntArray, IntArray]:
    """Last ids of words `[n]`, and what comes before them `[n, width]`, behind as many -1."""
    width = max(1, max(map(len, words)) - 1)
    before = np.full((len(words), width), -1)
    for index, word in enumerate(words):
        before[index, width - len(word) + 1 :] = word[:-1]
    return np.array([word[-1] for word in words]), before


def _num_likeliest(params: SamplingParams) -> int:
    """How many of the likeliest tokens are scored; -1 is no scores at all."""
    if params.logprob_token_ids is not None:
        return 0  # only those
    return -1 if params.logprobs is None else params.logprobs


def _penalised(numbers: Any) -> BoolArray:
    """Which of some rows of the table have penalties."""
    penalised: BoolArray = (
        (numbers["repetition"] != 1) | (numbers["presence"] != 0) | (numbers["frequency"] != 0)
    )
    return penalised
