"""Start the models of a server: one that writes, one that speaks, or one of each."""

import asyncio
from pathlib import Path

from nanovllm.async_llm import AsyncLLM
from nanovllm.async_speech import AsyncSpeech
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.hub import resolve_model
from nanovllm.models.voxcpm.config import is_speech
from nanovllm.server.adapters import load_modules, lora_modules
from nanovllm.server.state import ServerState
from nanovllm.text.message_format import MessageFormat


async def load_models(state: ServerState, engine: EngineConfig, pool: PoolConfig) -> None:
    """Start what the options name, and put it where the routes look for it.

    Args:
        state: The server, which has no models yet.
        engine: Options of the model that is not `speech_model`.
        pool: Options of its engines.

    Raises:
        FileNotFoundError: There is no such model.
        InvalidRequestError: An option or a checkpoint cannot be used.
        NotEnoughMemoryError: A model or its KV cache does not fit.
        RuntimeError: An engine process died.
    """
    speech, observe = state.speech_config, state.metrics.requests_of
    modules = lora_modules(state.config, engine)
    name = (state.config.served_model_name or [engine.model_id])[0]
    if await asyncio.to_thread(_speaks, engine):
        if speech.speech_model is not None:
            raise InvalidRequestError(
                f"{engine.model_id} speaks already: serve one speech model, and a text model "
                "beside it if you like",
                "speech_model",
            )
        state.speech_model = AsyncSpeech.from_config(engine, pool, observe(name))
    else:
        state.text_model = AsyncLLM.from_config(engine, pool, observe(name))
        if speech.speech_model is not None:
            beside = speech.engine(engine)
            if not await asyncio.to_thread(_speaks, beside):
                raise InvalidRequestError(
                    f"speech_model {beside.model_id} is no speech model: give a checkpoint of "
                    "VoxCPM; the model that writes is the one without a flag",
                    "speech_model",
                )
            name = (speech.speech_served_model_name or [beside.model_id])[0]
            state.speech_model = AsyncSpeech.from_config(beside, speech.pool(pool), observe(name))
    if len(set(state.model_names)) < len(state.model_names):
        raise InvalidRequestError(
            f"two models are called {state.names_of('speech')[0]!r}: give speech_served_model_name",
            "speech_served_model_name",
        )
    _open_voices(state)
    for model in state.models:  # one after another: each takes a share of the memory that is left
        await model.start()
    _check_parsers(state)
    await load_modules(state, engine, modules)
    if state.speech_model is not None and speech.default_voice is not None:
        await state.speech_model.voices.get(speech.default_voice)  # encoded, and known to be good


def _check_parsers(state: ServerState) -> None:
    """See that there are parsers of the names that the options have.

    Raises:
        InvalidRequestError: There is none.
    """
    tokenizer = None if state.text_model is None else state.text_model.tokenizer
    if tokenizer is not None:
        config = state.config
        MessageFormat.detect(None, tokenizer, config.tool_call_parser, config.reasoning_parser)


def _open_voices(state: ServerState) -> None:
    """Read which voices there are.

    Raises:
        FileNotFoundError: There is no such directory.
        InvalidRequestError: There is no model to use them, or the default one is not among them.
    """
    speech, model = state.speech_config, state.speech_model
    if model is None:
        if speech.voices or speech.default_voice:
            raise InvalidRequestError("voices are for a model that speaks: there is none", "voices")
        return
    if speech.voices is not None:
        model.voices.open_directory(Path(speech.voices).expanduser())
    if speech.default_voice is not None and speech.default_voice not in model.voices.names:
        raise InvalidRequestError(
            f"default_voice {speech.default_voice!r} is none of the voices: "
            f"{', '.join(model.voices.names) or 'there are none'}",
            "default_voice",
        )


def _speaks(engine: EngineConfig) -> bool:
    return is_speech(resolve_model(engine))
