"""What crosses between the scheduler and a runner: a batch of positions, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from nanovllm.sampling_params import SamplingParams

Key = int | bytes
"""What stands at a position: a token id, or the digest of the bytes fed for an audio patch."""

UNUSABLE_LOGITS = "the model's logits are NaN, or the request forbids every token"
LOST_GRAMMAR = "the structured output became too complex to follow: give it a simpler form"
UNUSABLE_PATCH = "the model's speech is NaN or infinite"
"""The reasons of errors that a client may be told; the others are texts of exceptions."""


def patch_key(latents: bytes) -> bytes:
    """The key of a position that holds an audio patch.

    Args:
        latents: The patch, float32 `[patch_size, feat_dim]`.
    """
    return blake2b(latents, digest_size=16).digest()


@dataclass(slots=True)
class SlotStart:
    """A sequence that takes a slot in this step, new or resumed.

    Args:
        slot: The slot it holds until it is released.
        keys: The keys known so far, prompt first.
        num_prompt_keys: How many of `keys` are the prompt.
        sampling_params: What to sample.
        sample_index: Which of the request's `n` completions this is.
        seed: Seed of its random draws, never None.
        adapter_id: LoRA adapter, or None.
        payload: Whatever else the runner needs to start the sequence; opaque to the engine.
    """

    slot: int
    keys: list[Key]
    num_prompt_keys: int
    sampling_params: SamplingParams
    sample_index: int
    seed: int
    adapter_id: int | None = None
    payload: Any = None


@dataclass(slots=True)
class Batch:
    """One step: bookkeeping of slots first, then the rows to compute, rows of one position first.

    Row `i` computes `lengths[i]` positions of the sequence in `slots[i]`, from position `starts[i]`
    on. Its last position yields a result if `emits[i]`.

    Args:
        step: Number of the step, counting up.
        released: Slots whose sequence ended or was preempted since the last step.
        started: Sequences that take a slot in this step; applied after `released`.
        new_blocks: `(slot, index, block_ids)`: blocks appended to a block table at `index`.
    """

    step: int
    released: list[int] = field(default_factory=list)
    started: list[SlotStart] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    emits: list[bool] = field(default_factory=list)
    num_decodes: int = 0

    @property
    def num_positions(self) -> int:
        return sum(self.lengths)


class Stop(NamedTuple):
    """Why the model ended a sequence.

    `reason` is a finish reason ("stop" or "error"), `detail` what it stopped at: None for an
    end-of-text id, another stop token's id, or the text of an error. `keeps_key` says that the last
    key is not what it stopped at, but part of the output: nothing may follow it.
    """

    reason: str
    detail: int | str | None = None
    keeps_key: bool = False


class StepResult(NamedTuple):
    """What a row that emits yielded: the key of the next position, and whether the model stops.

    `forced` are keys that can only be the next ones; then `stop` is about the last of them.
    """

    slot: int
    key: Key
    stop: Stop | None = None
    payload: Any = None
    forced: Sequence[Key] = ()


class TextRequest(NamedTuple):
    """What a text runner needs to start a sequence besides its sampling parameters.

    Args:
        eos_token_ids: The model's end-of-text ids; empty if the request ignores them.
        bad_words: Token sequences that must not be generated.
        grammar: The form of the output, for `GrammarCompiler.compile`.
        matcher: The same compiled or about to be, in the engine's own process: a `Future`.
        embeds: Whether the prompt's embedding is wanted with its first token.
    """

    eos_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    matcher: Any = None
    embeds: bool = False


class TokenScores(NamedTuple):
    """Log probabilities at one position: the actual token first, then the others asked for.

    `rank` is that of the actual token, counted from 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class TextPayload(NamedTuple):
    """What a text request asked for besides tokens; prompt fields come with the first token only.

    `prompt_scores` has an entry for each prompt token, None for the first. `embedding` is the
    hidden state of the last one, after the final norm: float32 `[hidden_size]`.
    """

    scores: TokenScores | None = None
    prompt_scores: list[TokenScores | None] | None = None
    embedding: bytes | None = None


@dataclass(slots=True)
class SpeechRequest:
    """What a speech runner needs to start a sequence besides its keys, seed and adapter.

    It belongs to one sequence: `n` is 1.

    Positions whose key is a digest hold audio. A trailing run of them is a recording that the
    speech continues.

    Args:
        latents: What stands at the prompt's audio positions, in order: float32
            `[num_patches, patch_size, feat_dim]`.
        cfg_value: Weight of classifier-free guidance.
        inference_timesteps: Steps of the flow-matching sampler, 2 to 100.
        temperature: Factor on its noise.
        min_len: The model may stop after patch `min_len + 1`, counted from 0.
        generated: Patches generated so far, each float32 `[patch_size, feat_dim]`; the runner
            appends to them, so that a sequence that was preempted can go on.
    """

    latents: bytes = b""
    cfg_value: float = 2.0
    inference_timesteps: int = 10
    temperature: float = 1.0
    min_len: int = 2
    generated: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class SpeechPayload:
    """A generated patch: its sound, and its latents for whoever wants to go on from them.

    Args:
        audio: float32 mono samples at the model's output rate.
        latents: float32 `[patch_size, feat_dim]`.
    """

    audio: bytes
    latents: bytes


class EngineOutput(NamedTuple):
    """News of one sequence after a step.

    Args:
        seq_id: The sequence.
        key: Its new key, or None if it ended without one.
        payload: What the runner sent along with the key.
        finish_reason: "stop", "length", "abort" or "error" once it has ended.
        stop_reason: See `CompletionOutput.stop_reason`.
        num_cached: Prompt positions that came from the prefix cache.
        scheduled_time: Monotonic time at which it first ran, in seconds.
    """

    seq_id: int
    key: Key | None
    payload: TextPayload | SpeechPayload | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    scheduled_time: float | None = None


class Runner(Protocol):
    """The engine's view of a model runner."""

    def launch(self, batch: Batch) -> Any:
        """Start a step on the device and return a handle to it."""

    def collect(self, handle: Any) -> list[StepResult]:
        """Wait for a step and return one result for each row that emits, in row order."""
