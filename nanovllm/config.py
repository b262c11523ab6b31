"""Options of engine, pool and server, and the only place that reads the environment."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from nanovllm.errors import InvalidRequestError
from nanovllm.validation import conform

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEFAULT_BLOCK_SIZE = 16

QUANTIZED_METHODS = ("gptq", "awq", "compressed-tensors")
"""Quantized checkpoints that we read."""
QUANTIZATIONS = ("int8", "int4", "int4-g32", "int4-g64", "int4-g128", *QUANTIZED_METHODS)
"""What `quantization` may be: what is done when weights are loaded, or what they come in."""

RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "documents",
        "messages",
        "tokenize",
        "tools",
    }
)
"""What a chat template reads, or a request says, under these names is nobody's to set besides."""

DTYPE_ALIASES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
}
"""Other names of types, vLLM's and the family's."""

ALIASES = {
    "num_kvcache_blocks": "num_kv_blocks",
    "kvcache_block_size": "block_size",
    "num_pages": "num_kv_blocks",
    "page_size": "block_size",
    "memory_ratio": "gpu_memory_utilization",
    "max_seq_len_override": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "max_prefill_length": "max_num_batched_tokens",
    "dummy_weight": "dummy_weights",
    "tp_size": "tensor_parallel_size",
    "data_parallel_size": "replicas",
    "scheduler_mode": "dispatch_policy",
}
"""Names that the family's engines use for our options."""

Dtype = Literal["auto", "float32", "float16", "bfloat16", "half", "fp16", "bf16", "float", "fp32"]

Config = TypeVar("Config", bound="Options")


class Options:
    """What the dataclasses of options have in common: they check, and read names and variables."""

    __slots__ = ()

    environment_aliases: ClassVar[Mapping[str, str]] = {}
    """The family's variables besides `NANOVLLM_<OPTION>`; the first one set wins."""

    @classmethod
    def names(cls) -> list[str]:
        return [option.name for option in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def from_options(cls: type[Config], **options: Any) -> Config:
        """Build from keyword options in our names or the family's.

        Raises:
            InvalidRequestError: An option is unknown (the message has the nearest name), given
                under two names, or outside its range.
        """
        config: Config = split_options(options, cls)[0]
        return config

    @classmethod
    def from_env(cls: type[Config], environ: Mapping[str, str] | None = None) -> Config:
        """Build from `NANOVLLM_<OPTION>` and the family's variables.

        Raises:
            InvalidRequestError: A value cannot be read as its option's type or is out of range.
        """
        environ = os.environ if environ is None else environ
        hints = get_type_hints(cls)
        variables = {f"NANOVLLM_{name.upper()}": name for name in cls.names()}
        variables |= {f"NANOVLLM_SERVERPOOL_{name.upper()}": name for name in cls.names()}
        values: dict[str, Any] = {}
        for variable, name in (variables | dict(cls.environment_aliases)).items():
            text = environ.get(variable, "").strip()
            if text and name not in values:
                values[name] = _parse(variable, text, hints[name])
        return cls(**values)

    def _check_types(self) -> None:
        """Hold every field to its type, and to its choices if it has some."""
        conform(self)
        hints = get_type_hints(type(self))
        for name in self.names():
            value, choices = getattr(self, name), get_args(hints[name])
            if get_origin(hints[name]) is Literal and value not in choices:
                raise InvalidRequestError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}", name
                )

    def _check_range(self, low: float, *names: str, high: float = float("inf")) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bounds = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
                raise InvalidRequestError(f"{name} must be {bounds}, got {value}", name)


def split_options(options: Mapping[str, Any], *classes: type[Any]) -> list[Any]:
    """Build one config of each class from keyword options, in our names or the family's.

    Raises:
        InvalidRequestError: No class has an option of this name (the message has the nearest), or
            it is given under two names, or outside its range.
    """
    values: list[dict[str, Any]] = [{} for _ in classes]
    known = [name for cls in classes for name in cls.names()]
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in known:
            nearest = get_close_matches(given, [*known, *ALIASES], n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidRequestError(f"unknown option {given!r}{hint}", given)
        target = next(v for v, cls in zip(values, classes, strict=True) if name in cls.names())
        if name in target:
            raise InvalidRequestError(f"option {name!r} is given twice", name)
        target[name] = value
    return [cls(**given) for given, cls in zip(values, classes, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Options):
    """Everything that is decided when an engine starts. Names are vLLM's.

    Args:
        model: Directory of a checkpoint or id of a hub repository; None is the bundled demo model.
        tokenizer: Directory to read the tokenizer from, if not the model's.
        chat_template: Jinja template, or the path of one, in place of the checkpoint's.
        model_source: Which hub an id refers to; "modelscope" needs the package of that name.
        revision: Branch, tag or commit on the hub.
        download_dir: Where downloads are kept; None is the hub library's cache.
        hf_token: Access token for the hub.
        endpoint: Base URL of the hub.
        local_files_only: Whether to use only what is already downloaded.
        dummy_weights: Fill the model with seeded random weights and read only its `config.json`.
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        dtype: "auto" is the checkpoint's own; "half" and "fp16" are "float16", "bf16" is
            "bfloat16", "float" and "fp32" are "float32".
        max_model_len: Longest prompt plus output in tokens; None is what the model and the memory
            allow.
        max_num_seqs: Sequences that run at the same time; None is 256, on a CPU 64.
        max_num_batched_tokens: Positions computed in one step, so also the size of a prefill
            chunk; None is 8192, on a CPU 1024.
        block_size: Positions in a KV block; None is 16 or what the attention backend needs.
        num_kv_blocks: KV blocks; None is what the memory allows.
        kv_cache_memory_bytes: Memory for the KV cache, in place of `gpu_memory_utilization`.
        gpu_memory_utilization: Share of the GPU's memory the engine may use, in (0, 1].
        enable_prefix_caching: Whether sequences share the KV blocks of a common prefix.
        max_cached_tokens: Tokens of ended sequences to keep for reuse at most, rounded up to whole
            blocks; None or 0 is no limit.
        async_scheduling: Whether a step is scheduled while the one before it still runs; None is
            yes, on a CPU no.
        tensor_parallel_size: Devices that share one model; only 1 for now.
        enforce_eager: Whether to run without captured graphs; there are none yet.
        kv_cache_dtype: "auto" keeps keys and values in `dtype`; "int8" takes half the memory of
            bfloat16, on a CPU.
        quantization: "int8", "int4" or "int4-gN" (N 32, 64 or 128) quantizes the weights when
            they are loaded, on a CPU; None leaves them as the checkpoint has them. "gptq", "awq"
            and "compressed-tensors" say that the checkpoint must be quantized so.
        deterministic: Whether a row's result may not depend on the rows beside it, bit by bit; on
            a CPU only.
        disable_cascade_attn: Whether rows that share KV blocks read them each for itself.
        cpu_threads: Threads that compute on a CPU; None is one a core this process may use.
        cpu_isa: Instruction set of the CPU kernels: "amx", "avx512", "avx2", "portable", or
            "torch" for torch's operators; "auto" takes the best there is.
        seed: Seeds the weights of `dummy_weights` and the requests that bring no seed.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    model: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    model_source: Literal["huggingface", "modelscope"] = "huggingface"
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    local_files_only: bool = False
    dummy_weights: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    max_cached_tokens: int | None = None
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    quantization: str | None = None
    deterministic: bool = False
    disable_cascade_attn: bool = False
    cpu_threads: int | None = None
    cpu_isa: Literal["auto", "amx", "avx512", "avx2", "portable", "amx-emulated", "torch"] = "auto"
    seed: int = 0

    environment_aliases: ClassVar[Mapping[str, str]] = {
        "MODEL_LOCAL_DIR": "model",
        "NANOVLLM_MODEL_PATH": "model",
        "NANO_VLLM_MODEL_PATH": "model",
        "MODEL_NAME": "model",
        "MODEL_DTYPE": "dtype",
        "TORCH_DTYPE": "dtype",
        "TENSOR_PARALLEL_SIZE": "tensor_parallel_size",
        "TP_SIZE": "tensor_parallel_size",
        "PAGE_TOKEN_BUDGET": "max_cached_tokens",
        "PREFIX_CACHE": "enable_prefix_caching",
        "PREFILL_CHUNK_SIZE": "max_num_batched_tokens",
        "NANOVLLM_SERVERPOOL_NUM_KVCACHE_BLOCKS": "num_kv_blocks",
    }

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        if self.num_kv_blocks == -1:  # nano-vllm's "as many as fit"
            object.__setattr__(self, "num_kv_blocks", None)
        self._check_range(
            1,
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_kv_blocks",
            "kv_cache_memory_bytes",
            "cpu_threads",
        )
        self._check_range(0, "max_cached_tokens")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise InvalidRequestError(
                f"quantization must be one of {', '.join(QUANTIZATIONS)}, got "
                f"{self.quantization!r}",
                "quantization",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidRequestError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}",
                "gpu_memory_utilization",
            )
        if self.tensor_parallel_size != 1:
            raise InvalidRequestError(
                f"tensor_parallel_size must be 1, got {self.tensor_parallel_size}: this version "
                "runs a model on one device",
                "tensor_parallel_size",
            )
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens={tokens} must be at least max_num_seqs={seqs}, one "
                "position for each running sequence",
                "max_num_batched_tokens",
            )

    @property
    def model_id(self) -> str:
        """What the model is called: its id on the hub, or the name of its directory."""
        if self.model is None:
            return DEMO_MODEL.name
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model

    def resolved_for(self, device_type: str) -> "EngineConfig":
        """Return a copy with the defaults that depend on the device filled in."""
        on_cpu = device_type == "cpu"
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        tokens = tokens or max(1024 if on_cpu else 8192, seqs or 1)
        return replace(
            self,
            device=cast(Any, device_type),
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs or min(64 if on_cpu else 256, tokens),
            block_size=self.block_size or DEFAULT_BLOCK_SIZE,
            async_scheduling=not on_cpu if self.async_scheduling is None else self.async_scheduling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(Options):
    """How many engines there are, who gets the next request, and how many are let in.

    Args:
        devices: CUDA devices, one engine in its own process on each; None is one engine on what
            `device` says.
        replicas: Engines without `devices`; on a CPU they share its cores evenly.
        dispatch_policy: "cache_aware", "least_loaded" (family: "fsfs"), "round_robin" ("rr") or
            "random", the better of two; another name warns and is "round_robin".
        max_inflight_total: Requests handed to the engines at a time; the others wait in line for
            up to `queue_timeout`. 0 is no limit.
        max_inflight_per_engine: The same for each engine.
        queue_timeout: Seconds a request waits in that line before it is refused.
        max_num_queued_reqs: Completions that may wait for an engine to run them; more are refused.
            None is four times what the engines run at a time.
        max_num_queued_tokens: Prompt tokens that may wait so; None is the larger of 2**20 and
            eight times the context.
        queue_coalesce_ms: Milliseconds, at most 50, that an idle engine waits after a request for
            others to start in the same step.
        step_timeout: Seconds without a step, while there is work, after which an engine counts as
            hung and is started anew.
        adaptive_max_new_tokens: Whether `max_tokens` shrinks while many requests are in flight.
        adaptive_max_inflight_threshold: From how many; None is the number of engines.
        adaptive_max_new_tokens_factor: To which share, at least 0.1.
        metric_window: Requests over which the pool's averages go.
        warm_prefixes: Texts whose KV blocks are computed at start; in the environment and on the
            command line one string, separated by `||`.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    devices: list[int] | None = None
    replicas: int = 1
    dispatch_policy: str = "cache_aware"
    max_inflight_total: int = 0
    max_inflight_per_engine: int = 0
    queue_timeout: float = 60.0
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    queue_coalesce_ms: float = 2.0
    step_timeout: float = 300.0
    adaptive_max_new_tokens: bool = False
    adaptive_max_inflight_threshold: int | None = None
    adaptive_max_new_tokens_factor: float = 0.8
    metric_window: int = 50
    warm_prefixes: str | None = None

    environment_aliases: ClassVar[Mapping[str, str]] = {
        "SCHEDULER_MODE": "dispatch_policy",
        "DP_SIZE": "replicas",
        "MAX_INFLIGHT_TOTAL": "max_inflight_total",
        "MAX_INFLIGHT_PER_ENGINE": "max_inflight_per_engine",
        "ADAPTIVE_MAX_NEW_TOKENS": "adaptive_max_new_tokens",
        "ADAPTIVE_MAX_INFLIGHT_THRESHOLD": "adaptive_max_inflight_threshold",
        "ADAPTIVE_MAX_NEW_TOKENS_FACTOR": "adaptive_max_new_tokens_factor",
        "METRIC_WINDOW": "metric_window",
        "WARM_PREFIXES": "warm_prefixes",
    }

    def __post_init__(self) -> None:
        self._check_types()
        self._check_range(1, "replicas", "metric_window")
        self._check_range(0, "max_inflight_total", "max_inflight_per_engine", "queue_timeout")
        self._check_range(0, "max_num_queued_reqs", "max_num_queued_tokens")
        self._check_range(0, "adaptive_max_inflight_threshold")
        self._check_range(0, "queue_coalesce_ms", high=50)
        self._check_range(0.001, "step_timeout")
        self._check_range(0.1, "adaptive_max_new_tokens_factor", high=1)
        devices = self.devices
        if devices is not None and (
            not devices or min(devices) < 0 or len(set(devices)) < len(devices)
        ):
            raise InvalidRequestError(
                f"devices must be different device numbers, got {devices}", "devices"
            )
        if devices is not None and self.replicas not in (1, len(devices)):
            raise InvalidRequestError(
                f"devices={devices} is one engine each: leave replicas={self.replicas} out",
                "replicas",
            )

    @property
    def num_engines(self) -> int:
        return len(self.devices) if self.devices is not None else self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(Options):
    """What the HTTP server listens on, whom it serves, and what it takes at most.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        uds: Path of a Unix socket to listen on instead.
        ssl_keyfile: Private key for TLS; None is the one in `ssl_certfile`.
        ssl_certfile: Certificate for TLS.
        root_path: Path below which a proxy serves us.
        served_model_name: Names that requests may use; the first is the one that responses have.
            None is the model's own.
        api_key: Keys, one of which a request has to bring; None lets everybody in.
        allowed_origins: Origins that browsers may call from; none by default.
        default_chat_template_kwargs: JSON object of what chat templates read besides the
            messages, such as `{"enable_thinking": false}`.
        chat_template_kwarg_names: Names a request may set in `chat_template_kwargs`.
        max_body_size: Bytes of a request's body.
        max_headers: Headers of a request.
        max_header_size: Bytes of a request line and its headers.
        request_timeout: Seconds a client may take to send a request.
        keep_alive_timeout: Seconds an idle connection is kept open.
        max_n: Completions of one prompt.
        max_prompts: Prompts in one request.
        max_stop_strings: Stop strings, of at most 256 characters, in one request.
        sse_keep_alive_interval: Seconds without news after which a stream sends a comment.
        shutdown_timeout: Seconds that running requests get to end after SIGTERM.
        zmq_control: Whether to open the control socket.
        zmq_control_endpoint: Its address.
        log_format: "text", or "json" for one JSON object a line.
        log_level: "debug", "info", "warning" or "error".
        access_log: Whether every request is logged.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    root_path: str = ""
    served_model_name: list[str] | None = None
    api_key: list[str] | None = field(default=None, repr=False)
    allowed_origins: list[str] | None = None
    default_chat_template_kwargs: str | None = None
    chat_template_kwarg_names: list[str] | None = None
    max_body_size: int = 4 << 20
    max_headers: int = 256
    max_header_size: int = 64 << 10
    request_timeout: float = 30.0
    keep_alive_timeout: float = 5.0
    max_n: int = 128
    max_prompts: int = 128
    max_stop_strings: int = 16
    sse_keep_alive_interval: float = 15.0
    shutdown_timeout: float = 30.0
    zmq_control: bool = False
    zmq_control_endpoint: str = "tcp://127.0.0.1:5557"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = False

    environment_aliases: ClassVar[Mapping[str, str]] = {
        "VLLM_API_KEY": "api_key",
        "LOG_LEVEL": "log_level",
        "ZMQ_CONTROL": "zmq_control",
        "ZMQ_CONTROL_ENDPOINT": "zmq_control_endpoint",
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_level", str(self.log_level).lower())
        self._check_types()
        self._check_range(0, "port", high=65535)
        self._check_range(1, "max_body_size", "max_headers", "max_header_size", "max_n")
        self._check_range(1, "max_prompts", "max_stop_strings")
        self._check_range(0.001, "request_timeout", "keep_alive_timeout")
        self._check_range(0.001, "sse_keep_alive_interval")
        self._check_range(0, "shutdown_timeout")
        if any(not key for key in self.api_key or []):
            raise InvalidRequestError("api_key must not be empty", "api_key")
        self._check_template_kwargs()
        if self.served_model_name is not None and not all(self.served_model_name):
            raise InvalidRequestError("served_model_name must not be empty", "served_model_name")

    def _check_template_kwargs(self) -> None:
        name = "default_chat_template_kwargs"
        kwargs = _json(self.default_chat_template_kwargs or "{}")
        if not isinstance(kwargs, dict):
            raise InvalidRequestError(
                f"{name} must be a JSON object, got {self.default_chat_template_kwargs!r}", name
            )
        if reserved := sorted(RESERVED_TEMPLATE_NAMES & kwargs.keys()):
            raise InvalidRequestError(
                f"{name} must not have {reserved[0]!r}: it comes from each request", name
            )


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parse(variable: str, text: str, hint: Any) -> Any:
    """Read an environment variable as the type of its option."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                text.lower()
            ]
        if get_origin(kind) is list:
            (item,) = get_args(kind)
            return [item(part.strip()) for part in text.split(",") if part.strip()]
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError) as e:
        raise InvalidRequestError(
            f"environment variable {variable}={text!r} is not a valid {kind.__name__}", variable
        ) from e
