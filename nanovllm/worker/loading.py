"""From options to an engine that is ready to step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.kernels.select import select_kernels
from nanovllm.lora_config import LAYER_MODULES
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.voxcpm.config import VoxCPMConfig, is_speech
from nanovllm.models.voxcpm.loading import load_speech_model
from nanovllm.models.weights import load_model, weight_source
from nanovllm.runners.memory import select_device, select_dtype
from nanovllm.runners.speech import SpeechRunner
from nanovllm.runners.text import TextRunner
from nanovllm.text.frontend import TextFrontend
from nanovllm.text.grammar_compiler import GrammarCompiler


class LoadedEngine(NamedTuple):
    """An engine, its runner, and the options with what was found out filled in."""

    engine: LLMEngine
    runner: TextRunner | SpeechRunner
    config: EngineConfig


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
    """
    device = select_device(config.device)
    shape = (VoxCPMConfig if is_speech(directory) else ModelConfig).from_directory(directory)
    if config.enable_lora and isinstance(shape, ModelConfig):
        config = replace(
            config,
            lora_enable_dit=False,
            lora_enable_proj=False,
            lora_target_modules_lm=config.lora_target_modules_lm or list(LAYER_MODULES),
        )
    config = config.resolved_for(device.type)
    dtype = select_dtype(config, shape, device)
    config = replace(config, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    kernels = select_kernels(config, device, dtype)
    with kernels.running():
        if isinstance(shape, VoxCPMConfig):
            speech = load_speech_model(config, shape, directory, kernels, dtype, device)
            runner: TextRunner | SpeechRunner = SpeechRunner(speech, kernels, config)
        else:
            source = weight_source(config, directory, dtype)
            text = load_model(shape, source, kernels, dtype=dtype, device=device, lora=config.lora)
            runner = TextRunner(text, kernels, config, grammars or _grammars(config, directory))
    return LoadedEngine(_build_engine(config, runner, directory), runner, config)


def _grammars(config: EngineConfig, directory: Path) -> GrammarCompiler:
    """A compiler that reads the tokenizer once it is needed: without forms, workers need none."""
    return GrammarCompiler(lambda: TextFrontend(directory, config).vocabulary())


def _build_engine(
    config: EngineConfig, runner: TextRunner | SpeechRunner, directory: Path
) -> LLMEngine:
    """Put blocks, a scheduler and an engine around a runner."""
    scheduler = Scheduler(
        BlockManager(
            runner.num_kv_blocks,
            runner.block_size,
            config.enable_prefix_caching,
            config.max_cached_tokens,
        ),
        config.max_num_seqs or 1,
        config.max_num_batched_tokens or 1,
        config.max_loras if config.enable_lora else 0,
    )
    return LLMEngine(
        runner,
        scheduler,
        max_model_len=runner.max_model_len,
        model_id=str(directory),
        async_scheduling=bool(config.async_scheduling),
        seed=config.seed,
    )
