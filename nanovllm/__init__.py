"""nanovllm: a small, readable inference engine for language models.

The names below are imported when they are first used, so `import nanovllm` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.config import EngineConfig, PoolConfig
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, RequestOutput
    from nanovllm.runners.model_runner import ModelRunner
    from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BlockManager",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "ModelRunner",
    "PoolConfig",
    "RequestOutput",
    "SamplingParams",
    "Scheduler",
    "Sequence",
    "__version__",
]

_MODULE_OF_NAME = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "BlockManager": "nanovllm.engine.block_manager",
    "CompletionOutput": "nanovllm.outputs",
    "EngineConfig": "nanovllm.config",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "ModelRunner": "nanovllm.runners.model_runner",
    "PoolConfig": "nanovllm.config",
    "RequestOutput": "nanovllm.outputs",
    "SamplingParams": "nanovllm.sampling_params",
    "Scheduler": "nanovllm.engine.scheduler",
    "Sequence": "nanovllm.engine.sequence",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
