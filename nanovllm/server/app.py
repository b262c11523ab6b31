"""The ASGI application. The model is loaded when it starts to serve, never at import."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import compile_path

from nanovllm import __version__
from nanovllm.cluster.control import ControlServer
from nanovllm.config import EngineConfig, PoolConfig, ServerConfig, SpeechConfig
from nanovllm.errors import InvalidRequestError, UnavailableError
from nanovllm.server import (
    anthropic,
    family,
    health,
    info,
    ollama,
    openai,
    playground,
    responses,
    speech,
    systemone,
    tokens,
)
from nanovllm.server.auth import Authenticate, route_path
from nanovllm.server.control import ControlledServer
from nanovllm.server.edge import Edge
from nanovllm.server.error_shapes import respond
from nanovllm.server.errors import to_api_error
from nanovllm.server.limits import RequestLimits
from nanovllm.server.loading import load_models
from nanovllm.server.metrics import Metrics
from nanovllm.server.openapi import DescribedAPI
from nanovllm.server.state import ServerState, require_loaded

if TYPE_CHECKING:
    from nanovllm.async_engine import AsyncEngine
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.async_speech import AsyncSpeech

logger = logging.getLogger(__name__)

MODEL_ROUTERS = (
    openai.router,
    responses.router,
    systemone.router,
    tokens.router,
    info.router,
    family.router,
    speech.router,
    anthropic.router,
    ollama.router,
)
EXPOSED_HEADERS = (
    *("X-Request-Id", "request-id", "Retry-After", "Allow", "WWW-Authenticate"),
    *("X-Audio-Sample-Rate", "X-Audio-Channels", "X-Audio-Encoding", "X-Audio-DType"),
)
"""What scripts of other origins may read of an answer, besides what every browser lets them."""
HANDLED_ERRORS = (HTTPException, RequestValidationError, InvalidRequestError, UnavailableError)


def create_app(
    server: ServerConfig | None = None,
    engine: EngineConfig | None = None,
    pool: PoolConfig | None = None,
    speech: SpeechConfig | None = None,
    *,
    llm: "AsyncLLM | None" = None,
    speaker: "AsyncSpeech | None" = None,
) -> FastAPI:
    """Build the application.

    Args:
        server: Whom it serves, and what it takes at most; None is what the environment says.
        engine: What it serves; likewise.
        pool: How many engines there are; likewise.
        speech: Whether a speech model is served beside it, and which voices; likewise.
        llm: A model that runs already, in place of the options; its owner closes it.
        speaker: A speech model that runs already; likewise.
    """
    server = server or ServerConfig.from_env()
    engine = engine or EngineConfig.from_env()
    pool = pool or PoolConfig.from_env()
    loaded = llm is not None or speaker is not None
    state = ServerState(server, speech or SpeechConfig.from_env(), Metrics(), llm, speaker, loaded)
    state.metrics.watch(state)
    if not loaded:
        state.metrics.requests_of((server.served_model_name or [engine.model_id])[0])
    app = DescribedAPI(
        title="nanovllm",
        version=__version__,
        redirect_slashes=False,
        lifespan=None if loaded else partial(_lifespan, engine=engine, pool=pool),
        middleware=_middleware(state),
    )
    # Unlike uvicorn's option, right whether or not the proxy strips the prefix.
    app.root_path = server.root_path
    app.state.server = state
    for error in HANDLED_ERRORS:
        app.add_exception_handler(error, _answer)
    app.include_router(health.router)
    app.include_router(playground.router)
    for router in MODEL_ROUTERS:
        app.include_router(router, dependencies=[Depends(require_loaded)])
    return app


def _middleware(state: ServerState) -> list[Middleware]:
    """The layers around the routes, outermost first."""
    server = state.config

    def speaks() -> bool:
        return state.speech_model is not None

    layers = [Middleware(Edge, metrics=state.metrics.http)]
    if server.allowed_origins:  # before the keys: browsers ask for permission without one
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=server.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        )
    if server.api_key:
        admin = [] if server.admin_key is None else [server.admin_key]
        layers.append(Middleware(Authenticate, keys=[*server.api_key, *admin]))
    return [*layers, Middleware(RequestLimits, config=server, takes_audio=speaks)]


async def _answer(request: Request, e: Exception) -> Response:
    error = to_api_error(e)
    if error.status_code == 405:
        error.headers = {**(error.headers or {}), "Allow": ", ".join(_methods_of(request))}
    return respond(error, route_path(request.scope))


def _methods_of(request: Request) -> list[str]:
    """The methods of a path; a route knows only its own, and one with parameters may match, too."""
    path = route_path(request.scope)
    routes = [
        route
        for route in iter_route_contexts(request.app.routes)
        if route.path and compile_path(route.path)[0].match(path)
    ]
    literal = [route for route in routes if route.path == path]
    methods = {method for route in literal or routes for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


@asynccontextmanager
async def _lifespan(app: FastAPI, engine: EngineConfig, pool: PoolConfig) -> AsyncIterator[None]:
    """Load the models while the socket is already open, so that /health and /ready answer."""
    state: ServerState = app.state.server
    async with AsyncExitStack() as stack:
        stack.push_async_callback(state.close)
        loading = asyncio.ensure_future(_start(state, engine, pool, stack))
        loading.add_done_callback(lambda task: _on_loaded(state, task))
        stack.callback(loading.cancel)
        yield


async def _start(
    state: ServerState, engine: EngineConfig, pool: PoolConfig, stack: AsyncExitStack
) -> None:
    """Open the control socket, if there shall be one, and load the models."""
    if state.config.zmq_control:
        control = ControlServer(
            state.config.zmq_control_endpoint,
            ControlledServer(state),
            metrics=lambda: health.pool_metrics(state).model_dump(),
        )
        await control.start()
        stack.push_async_callback(control.stop)
    await load_models(state, engine, pool)


def _on_loaded(state: ServerState, loading: "asyncio.Future[None]") -> None:
    if loading.cancelled():
        return
    state.startup_error = e = loading.exception()
    if e is None:
        state.loaded = True
        for name, model in state.named_models():
            for line in _describe(name, model):
                logger.info("%s", line)
        return
    expected = isinstance(e, ValueError | OSError | RuntimeError | ImportError)
    message = " ".join(str(e).split()) or type(e).__name__
    logger.error("the server cannot start: %s", message, exc_info=None if expected else e)
    signal.raise_signal(signal.SIGTERM)  # ends whatever server runs us


def _describe(name: str, model: "AsyncEngine[Any]") -> list[str]:
    """What has been loaded, and how much it can take on."""
    config, engines = model.config, model.stats().workers
    num_blocks = sum(worker.engine.num_kv_blocks for worker in engines)
    block_size = config.block_size or 1
    plural = "" if len(engines) == 1 else "s"
    return [
        f"{name} on {config.device}, {config.dtype}, {len(engines)} "
        f"engine{plural} of up to {config.max_num_seqs} sequences",
        f"KV cache of {num_blocks:,} blocks, {num_blocks * block_size:,} tokens; a request may "
        f"have {model.max_model_len:,}",
    ]


@cache
def _app_of_environment() -> FastAPI:
    return create_app()


def __getattr__(name: str) -> Any:
    """`app`, made of the environment's options when a server asks for it."""
    if name == "app":
        return _app_of_environment()
    raise AttributeError(name)


def __dir__() -> list[str]:
    return [*globals(), "app"]
