"""What an engine process and its client tell each other: msgpack, no code, no pickle.

A client sends `Start` once, then requests. A worker answers with `Started` or `Failed`, then sends
`News` after every step.
"""

from collections.abc import Sequence

import msgspec

from nanovllm.batch import EngineOutput, Key, SpeechRequest, TextRequest
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.llm_engine import EngineStats
from nanovllm.sampling_params import SamplingParams


class Message(msgspec.Struct, tag=True, array_like=True):
    """The base of them all."""


class Start(Message):
    """Build an engine.

    Args:
        config: What to build.
        directory: The checkpoint.
        cuda_devices: The only CUDA devices the process may see; None is all of them.
        cpus: CPUs it may run on if it computes there; None is all of them.
        queue_coalesce_ms: How long an idle engine waits for requests to come together.
    """

    config: EngineConfig
    directory: str
    cuda_devices: list[int] | None
    cpus: list[int] | None
    queue_coalesce_ms: float


class AddRequest(Message):
    """Queue a request; its sequences have the ids from `first_seq_id` on. See `LLMEngine.add`."""

    first_seq_id: int
    keys: Sequence[Key]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    payload: TextRequest | SpeechRequest
    adapter_id: int | None = None


class AbortSequences(Message):
    """End sequences that nobody waits for any more; there is no answer."""

    seq_ids: list[int]


class PauseSequences(Message):
    """Schedule these sequences no more until they are resumed; their readers are too slow."""

    seq_ids: list[int]
    paused: bool


class EncodeAudio(Message):
    """Encode a recording, in slices between steps; answered by `Answer`.

    Args:
        call_id: Says which answer is whose.
        audio: float32 mono samples at the encoder's rate, padded to whole patches.
    """

    call_id: int
    audio: bytes


class CancelCall(Message):
    """Drop a call that nobody waits for any more; it is answered all the same, now or earlier."""

    call_id: int


class LoadAdapter(Message):
    """Read a LoRA adapter from a directory; answered by `Answer`."""

    call_id: int
    adapter_id: int
    directory: str


class UnloadAdapter(Message):
    """Forget an adapter that no open sequence uses; answered by `Answer`."""

    call_id: int
    adapter_id: int


class Shutdown(Message):
    """End the process."""


class Started(Message):
    """The engine is ready.

    Args:
        config: Options, with what was found out filled in.
        num_kv_blocks: Blocks of the KV cache.
        max_model_len: Longest prompt plus output.
    """

    config: ResolvedConfig
    num_kv_blocks: int
    max_model_len: int


class Failed(Message):
    """The engine could not be built.

    Args:
        kind: Name of the exception's class.
        message: Its text.
    """

    kind: str
    message: str


class Answer(Message):
    """What became of a call.

    Args:
        call_id: Which one.
        data: The latents of `EncodeAudio`, float32 `[num_patches, patch_size, feat_dim]`; the names
            of the tensors of `LoadAdapter`, one a line.
        kind: Name of the exception's class if it failed.
        message: Its text.
    """

    call_id: int
    data: bytes = b""
    kind: str | None = None
    message: str = ""


class News(Message):
    """What a step brought, or what changed without one.

    Args:
        outputs: News of the sequences.
        stats: The engine's counters.
        num_positions: Positions the step computed; 0 if there was none.
        num_handled: Messages of the client that have been dealt with since the start.
    """

    outputs: list[EngineOutput]
    stats: EngineStats
    num_positions: int
    num_handled: int


class LogRecord(Message):
    """A line for the client's log."""

    logger: str
    level: int
    message: str


ToWorker = (
    Start
    | AddRequest
    | AbortSequences
    | PauseSequences
    | EncodeAudio
    | CancelCall
    | LoadAdapter
    | UnloadAdapter
    | Shutdown
)
FromWorker = Started | Failed | News | Answer | LogRecord


encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
