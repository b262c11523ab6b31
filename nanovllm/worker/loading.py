"""From options to an engine that is ready to step."""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import InvalidRequestError, NotEnoughMemoryError, RankDiedError
from nanovllm.kernels.attention_select import default_block_size
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.kernels.select import select_kernels
from nanovllm.layers.parallel import TensorParallel
from nanovllm.lora_config import LAYER_MODULES
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.sharding import Sharding
from nanovllm.models.voxcpm.config import VoxCPMConfig, is_speech
from nanovllm.models.voxcpm.loading import load_speech_model
from nanovllm.models.weights import load_model, weight_source
from nanovllm.runners.graphs import graph_capture
from nanovllm.runners.memory import select_device, select_dtype
from nanovllm.runners.parallel import ParallelRunner
from nanovllm.runners.speech import SpeechRunner
from nanovllm.runners.text import TextRunner
from nanovllm.text.frontend import TextFrontend
from nanovllm.text.grammar_compiler import GrammarCompiler
from nanovllm.worker.ranks import RankProcesses


class LoadedEngine(NamedTuple):
    """An engine, its runner, and the options with what was found out filled in."""

    engine: LLMEngine
    runner: TextRunner | SpeechRunner | ParallelRunner
    config: ResolvedConfig


@contextlib.contextmanager
def _lack_of_memory_told() -> Iterator[None]:
    """Make one error, with advice, of the many by which memory turns out to be too little."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as e:
        lacks = isinstance(e, MemoryError | torch.OutOfMemoryError)
        # The latter is what torch says of the CPU's memory.
        if not (lacks or getattr(e, "errno", 0) == errno.ENOMEM or "can't allocate" in str(e)):
            raise
        raise NotEnoughMemoryError(
            f"the model and its KV cache do not fit into memory ({e}): lower num_kv_blocks, "
            "kv_cache_memory_bytes or gpu_memory_utilization if they ask for too much, quantize "
            "the model (quantization=), or free memory"
        ) from e


def load_engine(
    config: EngineConfig, directory: Path, grammars: GrammarCompiler | None = None
) -> LoadedEngine:
    """Load a model and build the engine that runs it, in this process.

    Args:
        config: What to build.
        directory: The checkpoint.
        grammars: Compiles the forms of a text model's outputs; None is one of its own.

    Raises:
        InvalidRequestError: An option or the checkpoint cannot be used; the message says why.
        NotEnoughMemoryError: The model or a single KV block does not fit.
        RankDiedError: A process that was to have a part of it died.
    """
    load = load_runner if config.tensor_parallel_size == 1 else _load_parallel_runner
    runner, resolved = load(config, directory, grammars)
    return LoadedEngine(_build_engine(resolved, runner, directory), runner, resolved)


@_lack_of_memory_told()
def load_runner(
    config: EngineConfig,
    directory: Path,
    grammars: GrammarCompiler | None = None,
    parallel: TensorParallel | None = None,
) -> tuple[TextRunner | SpeechRunner, ResolvedConfig]:
    """Load a model, or this rank's part of it; see `load_engine`.

    Args:
        config: What to build.
        directory: The checkpoint.
        grammars: See `load_engine`.
        parallel: The ranks of the model, all of which call this; None if all of it is to be here.

    Returns:
        What runs it, and the options with what was found out filled in.

    Raises:
        NotEnoughMemoryError: The model or its KV cache does not fit.
    """
    device = rank_device(config, 0 if parallel is None else parallel.rank)
    shape = (VoxCPMConfig if is_speech(directory) else ModelConfig).from_directory(directory)
    if config.enable_lora and isinstance(shape, ModelConfig):
        config = replace(
            config,
            lora_enable_dit=False,
            lora_enable_proj=False,
            lora_target_modules_lm=config.lora_target_modules_lm or list(LAYER_MODULES),
        )
    default = default_block_size(config.attention_backend, device)
    config = config.resolved_for(device.type, default)
    dtype = select_dtype(config, shape, device)
    config = replace(config, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    kernels = select_kernels(config, device, dtype)
    capture = graph_capture(config, device)
    with kernels.running():
        if isinstance(shape, VoxCPMConfig):
            speech = load_speech_model(config, shape, directory, kernels, dtype, device)
            runner: TextRunner | SpeechRunner = SpeechRunner(speech, kernels, config, capture)
        else:
            source = weight_source(config, directory, dtype)
            text = load_model(
                shape,
                source,
                kernels,
                dtype=dtype,
                device=device,
                lora=config.lora,
                parallel=parallel,
            )
            grammars = grammars or _grammars(config, directory)
            runner = TextRunner(text, kernels, config, grammars, capture, parallel)
    runner.capture()
    return runner, config


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank, which becomes the current one; raises like `select_device`."""
    device = select_device(config.device)
    if config.tensor_parallel_size > 1 and device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    return device


def _load_parallel_runner(
    config: EngineConfig, directory: Path, grammars: GrammarCompiler | None
) -> tuple[ParallelRunner, ResolvedConfig]:
    """Have other processes load their parts of a model while this one loads its own."""
    size = config.tensor_parallel_size
    check_parallel(config, directory)
    device = rank_device(config, 0)
    if device.type == "cpu":
        config = replace(
            config, cpu_threads=config.cpu_threads or max(num_usable_cores() // size, 1)
        )
    ranks = RankProcesses(replace(config, device=cast(Any, device.type)), directory)
    try:
        ranks.wait_until_ready()
        parallel = ranks.meet(
            lambda: TensorParallel.connect(0, size, ranks.meeting, device, config.deterministic)
        )
        ranks.abort = parallel.abort
        runner, resolved = load_runner(config, directory, grammars, parallel)
        ranks.loaded()
    except BaseException as e:
        # Who misses another rank does not know why, nor who computed with what it did not send.
        cause = ranks.failure() if isinstance(e, RankDiedError) else ranks.failure(0)
        ranks.close()
        if cause is not None and isinstance(e, Exception):
            raise cause from None
        raise
    return ParallelRunner(cast(TextRunner, runner), ranks), resolved


def check_parallel(config: EngineConfig, directory: Path) -> None:
    """See that a model can be shared out, before processes are started.

    Raises:
        InvalidRequestError: It cannot.
    """
    size, device = config.tensor_parallel_size, select_device(config.device)
    problem = None
    if is_speech(directory):
        problem = "speech models run on one device"
    elif device.type not in ("cuda", "cpu"):
        problem = f"a model on {device.type} runs on one device"
    elif device.type == "cuda" and size > torch.cuda.device_count():
        problem = f"it needs as many CUDA devices, and {torch.cuda.device_count()} can be seen"
    if problem is not None:
        raise InvalidRequestError(
            f"tensor_parallel_size={size} is not possible: {problem}", "tensor_parallel_size"
        )
    Sharding(ModelConfig.from_directory(directory), 0, size)


def _grammars(config: EngineConfig, directory: Path) -> GrammarCompiler:
    """A compiler that reads the tokenizer once it is needed: without forms, workers need none."""
    return GrammarCompiler(lambda: TextFrontend(directory, config).vocabulary())


def _build_engine(
    config: ResolvedConfig, runner: TextRunner | SpeechRunner | ParallelRunner, directory: Path
) -> LLMEngine:
    """Put blocks, a scheduler and an engine around a runner."""
    scheduler = Scheduler(
        BlockManager(
            runner.num_kv_blocks,
            runner.block_size,
            config.enable_prefix_caching,
            config.max_cached_tokens,
        ),
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_loras if config.enable_lora else 0,
    )
    return LLMEngine(
        runner,
        scheduler,
        max_model_len=runner.max_model_len,
        model_id=str(directory),
        async_scheduling=config.async_scheduling,
        seed=config.seed,
    )
