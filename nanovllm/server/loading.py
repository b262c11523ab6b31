"""Start the models of a server: one that writes, one that speaks, or one of each."""

import asyncio
from dataclasses import replace
from pathlib import Path

from nanovllm.async_llm import AsyncLLM
from nanovllm.async_speech import AsyncSpeech
from nanovllm.config import EngineConfig, PoolConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.hub import resolve_model
from nanovllm.models.voxcpm.config import is_speech
from nanovllm.server.state import ServerState


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
        # Adapters are the speech model's: the engine's options for them are meant for it.
        writer = replace(engine, enable_lora=engine.enable_lora and speech.speech_model is None)
        state.text_model = AsyncLLM.from_config(writer, pool, observe(name))
        if speech.speech_model is not None:
            beside = speech.engine(engine)
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
    if state.speech_model is not None and speech.default_voice is not None:
        await state.speech_model.voices.get(speech.default_voice)  # encoded, and known to be good


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
