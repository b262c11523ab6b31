"""Options of speech: a speech model beside a text model, and the voices."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from nanovllm.config.engine import EngineConfig
from nanovllm.config.options import Options
from nanovllm.config.pool import PoolConfig
from nanovllm.errors import InvalidRequestError

OWN_OPTIONS = (
    "dtype",
    "quantization",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "cpu_threads",
)
"""What a speech model beside a text model has as `speech_*` of its own."""
NOT_SHARED = (
    "tokenizer",
    "chat_template",
    "revision",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_kv_blocks",
    "kv_cache_memory_bytes",
    "kv_cache_dtype",
    "quantization",
)
"""What is meant for the text model alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechConfig(Options):
    """What a server needs to know to speak.

    A model that speaks may be the only one, and then has the engine's options; beside a text model
    it has those named `speech_*`.

    Args:
        speech_model: Directory or hub id of a speech model to serve beside the other one.
        speech_served_model_name: Names that requests may use for it; None is the model's own.
        speech_devices: CUDA devices, one speech engine on each; None is one engine on what
            `device` says.
        speech_dtype: Its `dtype`; None is the engine's.
        speech_quantization: Its `quantization`; None is none.
        speech_max_model_len: Its `max_model_len`; None is what the model and the memory allow.
        speech_max_num_seqs: Its `max_num_seqs`.
        speech_max_num_batched_tokens: Its `max_num_batched_tokens`.
        speech_gpu_memory_utilization: Its `gpu_memory_utilization`; None is the engine's, which two
            models on one GPU cannot both have.
        speech_cpu_threads: Its `cpu_threads`; None is the engine's.
        inference_timesteps: Steps of the sampler for a request that does not say; fewer are
            faster and rougher.
        voices: Directory of voices: a recording each, and beside it a `.txt` of the same name with
            what it says.
        default_voice: Name of the voice for requests that name none.
        mp3_bitrate_kbps: Bit rate of MP3.
        mp3_quality: 0 to 2, as the family's servers are told it; without effect.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    speech_model: str | None = None
    speech_served_model_name: list[str] | None = None
    speech_devices: list[int] | None = None
    speech_dtype: str | None = None
    speech_quantization: str | None = None
    speech_max_model_len: int | None = None
    speech_max_num_seqs: int | None = None
    speech_max_num_batched_tokens: int | None = None
    speech_gpu_memory_utilization: float | None = None
    speech_cpu_threads: int | None = None
    inference_timesteps: int = 10
    voices: str | None = None
    default_voice: str | None = None
    mp3_bitrate_kbps: int = 192
    mp3_quality: int = 2

    environment_aliases: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        self._check_types()
        self._check_range(2, "inference_timesteps", high=100)
        self._check_range(32, "mp3_bitrate_kbps", high=320)
        self._check_range(0, "mp3_quality", high=2)
        if self.speech_model is None:
            for name in self.names():
                if name.startswith("speech_") and getattr(self, name) is not None:
                    raise InvalidRequestError(
                        f"{name} is for a speech model beside a text model: give speech_model, or "
                        f"{name.removeprefix('speech_')}",
                        name,
                    )

    def engine(self, base: EngineConfig) -> EngineConfig:
        """The options of the speech engine, where `base` has those of the text engine."""
        default = EngineConfig()
        options = {name: getattr(default, name) for name in NOT_SHARED}
        for name in OWN_OPTIONS:
            if (value := getattr(self, f"speech_{name}")) is not None:
                options[name] = value
        return replace(base, model=self.speech_model, **options)

    def pool(self, base: PoolConfig) -> PoolConfig:
        """The options of the speech engines' pool, where `base` has those of the text engines."""
        return replace(
            base,
            devices=self.speech_devices,
            replicas=1,
            warm_prefixes=None,
            max_num_queued_reqs=None,
            max_num_queued_tokens=None,
        )
