"""Options of an engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from nanovllm.config.attention import attention_backend_name
from nanovllm.config.options import Options, Switch
from nanovllm.errors import InvalidRequestError
from nanovllm.lora_config import LoRAConfig

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
DEFAULT_BLOCK_SIZE = 16

QUANTIZED_METHODS = ("gptq", "awq", "compressed-tensors")
"""Quantized checkpoints that we read."""
QUANTIZATIONS = ("int8", "int4", "int4-g32", "int4-g64", "int4-g128", *QUANTIZED_METHODS)
"""What `quantization` may be: what is done when weights are loaded, or what they come in."""

DTYPE_ALIASES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
}
"""Other names of types, vLLM's and the family's."""

Dtype = Literal["auto", "float32", "float16", "bfloat16", "half", "fp16", "bf16", "float", "fp32"]


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
        dtype: "auto" is the checkpoint's own, but bfloat16 for float16 on a CPU; "half" and "fp16"
            are "float16", "bf16" is "bfloat16", "float" and "fp32" are "float32".
        max_model_len: Longest prompt plus output in tokens; None is what the model and the memory
            allow.
        max_num_seqs: Sequences that run at the same time; None is 256, on a CPU 64.
        max_num_batched_tokens: Positions computed in one step, so also the size of a prefill
            chunk; None is 8192, on a CPU 1024.
        block_size: Positions in a KV block; None is 16 or what the attention backend needs, 256
            for version 2 of "flash-attn".
        num_kv_blocks: KV blocks; None is what the memory allows.
        kv_cache_memory_bytes: Memory for the KV cache, in place of `gpu_memory_utilization`.
        gpu_memory_utilization: Share of the GPU's memory the engine may use, in (0, 1].
        enable_prefix_caching: Whether sequences share the KV blocks of a common prefix.
        max_cached_tokens: Tokens of ended sequences to keep for reuse at most, rounded up to whole
            blocks; None or 0 is no limit.
        async_scheduling: Whether a step is scheduled while the one before it still runs; None is
            yes, on a CPU no.
        tensor_parallel_size: Devices that have a part of the model each, at most 8, with a process
            for each; on a CPU these processes share its cores and its memory. `cpu_threads` and
            `kv_cache_memory_bytes` are of each of them.
        attention_backend: "triton", ours for GPUs; "flash-attn" or "flashinfer", once installed;
            "sdpa", torch's; "cpu", ours for CPUs; or two for prompts and for decodes, such as
            "flash-attn,triton". "auto" takes the best that is there and logs which. vLLM's names
            are read too.
        enforce_eager: Whether to run without captured CUDA graphs, or replayed kernels on a CPU.
        max_cudagraph_capture_size: Most decodes in a step that runs as a captured graph; None is
            `max_num_seqs`, at most 512, and 0 captures none.
        compile_model: Whether `torch.compile` compiles what a speech model computes with torch's
            operators: of its sampler, and of its autoencoder where no kernels of ours run.
        kv_cache_dtype: "auto" keeps keys and values in `dtype`; "int8" takes half the memory of
            bfloat16, on a CPU.
        quantization: "int8", "int4" or "int4-gN" (N 32, 64 or 128) quantizes the weights when
            they are loaded, on a CPU; None leaves them as the checkpoint has them. "gptq", "awq"
            and "compressed-tensors" say that the checkpoint must be quantized so.
        deterministic: Whether a row's result may not depend on the rows beside it, bit by bit;
            needs our CPU or our Triton kernels.
        disable_cascade_attn: Whether each row reads the KV blocks it shares with others by itself,
            instead of one read for all of them (cascade attention).
        cpu_threads: Threads that compute on a CPU; None is one a core this process may use.
        cpu_isa: Instruction set of the CPU kernels: "amx", "avx512", "avx2", "portable", or
            "torch" for torch's operators; "auto" takes the best there is.
        seed: Seeds the weights of `dummy_weights` and the requests that bring no seed.
        enable_lora: Whether LoRA adapters can be registered while the engine runs.
        max_loras: Different adapters in the running sequences at a time. Their memory is taken at
            the start.
        max_lora_rank: Greatest rank of an adapter.
        lora_enable_lm: Whether an adapter may change the language models.
        lora_enable_dit: Whether it may change the diffusion transformer.
        lora_enable_proj: Whether it may change the projections between them.
        lora_target_modules_lm: Linear layers of the language models that it may change; None is
            all of a model that writes, and those of the attention of one that speaks. With
            "gate_proj" or "up_proj" the MLPs run a little slower.
        lora_target_modules_dit: The same of the diffusion transformer.
        lora_target_proj_modules: Projections that it may change; None is all of them.

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
    attention_backend: str = "auto"
    enforce_eager: bool = False
    max_cudagraph_capture_size: int | None = None
    compile_model: bool = False
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    quantization: str | None = None
    deterministic: bool = False
    disable_cascade_attn: bool = False
    cpu_threads: int | None = None
    cpu_isa: Literal["auto", "amx", "avx512", "avx2", "portable", "amx-emulated", "torch"] = "auto"
    seed: int = 0
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 32
    lora_enable_lm: bool = True
    lora_enable_dit: bool = True
    lora_enable_proj: bool = False
    lora_target_modules_lm: list[str] | None = None
    lora_target_modules_dit: list[str] | None = None
    lora_target_proj_modules: list[str] | None = None

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
        "NANOVLLM_LORA_ENABLED": "enable_lora",
        "NANOVLLM_LORA_MAX_LORAS": "max_loras",
        "NANOVLLM_LORA_MAX_LORA_RANK": "max_lora_rank",
        "ATTN_IMPL": "attention_backend",
        "ATTN_IMPLEMENTATION": "attention_backend",
        "VLLM_ATTENTION_BACKEND": "attention_backend",
        "COMPILE_MODEL": "compile_model",
        "USE_TORCH_COMPILE": "compile_model",
    }
    environment_switches: ClassVar[Mapping[str, Switch]] = {
        "ENABLE_FLASH_ATTENTION": Switch("attention_backend", on="auto", off="sdpa"),
        "ENABLE_CUDA_GRAPH": Switch("enforce_eager", on=False, off=True),
        "ENABLE_DECODE_CUDA_GRAPH": Switch("enforce_eager", on=False, off=True),
        "MINISGL_DISABLE_OVERLAP_SCHEDULING": Switch("async_scheduling", on=False, off=None),
        "NANOVLLM_DISABLE_OVERLAP_SCHEDULING": Switch("async_scheduling", on=False, off=None),
    }
    removed_variables: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("NANOVLLM_LORA_URI", "NANOVLLM_LORA_ID", "NANOVLLM_LORA_SHA256"),
        "set NANOVLLM_LORA_ENABLED=true and register adapters while the engine runs",
    )

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        name = attention_backend_name(self.attention_backend)
        object.__setattr__(self, "attention_backend", name)
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
        self._check_range(0, "max_cached_tokens", "max_cudagraph_capture_size")
        self._check_range(1, "tensor_parallel_size", high=8)
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
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens={tokens} must be at least max_num_seqs={seqs}, one "
                "position for each running sequence",
                "max_num_batched_tokens",
            )
        self._lora_config()

    @property
    def lora(self) -> LoRAConfig | None:
        """Which adapters the engine takes; None if it takes none."""
        return self._lora_config() if self.enable_lora else None

    def _lora_config(self) -> LoRAConfig:
        """The options of adapters.

        Raises:
            InvalidRequestError: One of them is outside its range.
        """
        names = [f.name for f in fields(LoRAConfig)]
        given = {name: getattr(self, f"lora_{name}", None) for name in names}
        given |= {"max_loras": self.max_loras, "max_lora_rank": self.max_lora_rank}
        return LoRAConfig(**{name: value for name, value in given.items() if value is not None})

    @property
    def model_id(self) -> str:
        """What the model is called: its id on the hub, or the name of its directory."""
        if self.model is None:
            return DEMO_MODEL.name
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model

    def resolved_for(
        self, device_type: str, block_size: int = DEFAULT_BLOCK_SIZE
    ) -> "ResolvedConfig":
        """Return these options with the defaults that depend on the device filled in.

        Args:
            device_type: "cpu", "cuda" or "mps".
            block_size: The default of the option, see `kernels.attention_select`.
        """
        on_cpu = device_type == "cpu"
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        tokens = tokens or max(1024 if on_cpu else 8192, seqs or 1)
        ahead = self.async_scheduling
        found: dict[str, Any] = {
            "device": device_type,
            "max_num_batched_tokens": tokens,
            "max_num_seqs": seqs or min(64 if on_cpu else 256, tokens),
            "block_size": self.block_size or block_size,
            "async_scheduling": not on_cpu if ahead is None else ahead,
        }
        return ResolvedConfig(**{name: getattr(self, name) for name in self.names()} | found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """The options of an engine whose device is known: these are not left open any more."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    async_scheduling: bool
