"""nanovllm: a small, readable inference engine for language models and speech.

The names below are imported when they are first used, so `import nanovllm` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.async_speech import AsyncSpeech
    from nanovllm.async_voxcpm import AsyncVoxCPMServerPool
    from nanovllm.config import EngineConfig, PoolConfig
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.llm import LLM
    from nanovllm.lora_config import LoRAConfig, LoRARequest
    from nanovllm.outputs import (
        CompletionOutput,
        EmbeddingRequestOutput,
        RequestOutput,
        SpeechOutput,
    )
    from nanovllm.runners.model_runner import ModelRunner
    from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
    from nanovllm.speech_params import SpeechParams
    from nanovllm.voxcpm import SyncVoxCPMServerPool, VoxCPM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncSpeech",
    "AsyncVoxCPMServerPool",
    "BlockManager",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "LLMEngine",
    "LoRAConfig",
    "LoRARequest",
    "ModelRunner",
    "PoolConfig",
    "RequestOutput",
    "SamplingParams",
    "Scheduler",
    "Sequence",
    "SpeechOutput",
    "SpeechParams",
    "StructuredOutputsParams",
    "SyncVoxCPMServerPool",
    "VoxCPM",
    "__version__",
]

_MODULE_OF_NAME = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "AsyncSpeech": "nanovllm.async_speech",
    "AsyncVoxCPMServerPool": "nanovllm.async_voxcpm",
    "BlockManager": "nanovllm.engine.block_manager",
    "CompletionOutput": "nanovllm.outputs",
    "EmbeddingRequestOutput": "nanovllm.outputs",
    "EngineConfig": "nanovllm.config",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "LoRAConfig": "nanovllm.lora_config",
    "LoRARequest": "nanovllm.lora_config",
    "ModelRunner": "nanovllm.runners.model_runner",
    "PoolConfig": "nanovllm.config",
    "RequestOutput": "nanovllm.outputs",
    "SamplingParams": "nanovllm.sampling_params",
    "Scheduler": "nanovllm.engine.scheduler",
    "Sequence": "nanovllm.engine.sequence",
    "SpeechOutput": "nanovllm.outputs",
    "SpeechParams": "nanovllm.speech_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
    "SyncVoxCPMServerPool": "nanovllm.voxcpm",
    "VoxCPM": "nanovllm.voxcpm",
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
