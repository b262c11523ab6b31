"""Options of engine, pool, server and speech, and the only place that reads the environment."""

from nanovllm.config.engine import (
    DEFAULT_BLOCK_SIZE,
    DEMO_MODEL,
    QUANTIZATIONS,
    QUANTIZED_METHODS,
    EngineConfig,
    ResolvedConfig,
)
from nanovllm.config.options import ALIASES, Options, split_options
from nanovllm.config.pool import PoolConfig
from nanovllm.config.server import RESERVED_TEMPLATE_NAMES, ServerConfig
from nanovllm.config.speech import SpeechConfig

__all__ = [
    "ALIASES",
    "DEFAULT_BLOCK_SIZE",
    "DEMO_MODEL",
    "QUANTIZATIONS",
    "QUANTIZED_METHODS",
    "RESERVED_TEMPLATE_NAMES",
    "EngineConfig",
    "Options",
    "PoolConfig",
    "ResolvedConfig",
    "ServerConfig",
    "SpeechConfig",
    "split_options",
]
