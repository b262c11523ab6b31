"""From options to an engine that is ready to step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.kernels.select import select_kernels
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.weights import load_model, weight_source
from nanovllm.runners.memory import select_device, select_dtype
from nanovllm.runners.text import TextRunner


class LoadedEngine(NamedTuple):
    """An engine, its runner, and the options with what was found out filled in."""

    engine: LLMEngine
    runner: TextRunner
    config: EngineConfig


def load_engine(config: EngineConfig, directory: Path) -> LoadedEngine:
    """Load a model and build the engine that runs it, in this process.

    Args:
        config: What to build.
        directory: The checkpoint.

    Raises:
        InvalidRequestError: An option or the checkpoint cannot be used; the message says why.
        NotEnoughMemoryError: The model or a single KV block does not fit.
    """
    device = select_device(config.device)
    model_config = ModelConfig.from_directory(directory)
    config = config.resolved_for(device.type)
    dtype = select_dtype(config, model_config, device)
    config = replace(config, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    kernels = select_kernels(config, device, dtype)
    with kernels.running():
        source = weight_source(config, directory, dtype)
        model = load_model(model_config, source, kernels, dtype=dtype, device=device)
        runner = TextRunner(model, kernels, config)
    scheduler = Scheduler(
        BlockManager(
            runner.num_kv_blocks,
            runner.block_size,
            config.enable_prefix_caching,
            config.max_cached_tokens,
        ),
        config.max_num_seqs or 1,
        config.max_num_batched_tokens or 1,
    )
    engine = LLMEngine(
        runner,
        scheduler,
        max_model_len=runner.max_model_len,
        model_id=str(directory),
        async_scheduling=bool(config.async_scheduling),
        seed=config.seed,
    )
    return LoadedEngine(engine, runner, config)
