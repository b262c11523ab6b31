"""The ASGI application. The model is loaded when it starts to serve, never at import."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from nanovllm import __version__
from nanovllm.async_llm import AsyncLLM
from nanovllm.cluster.control import ControlServer
from nanovllm.config import EngineConfig, PoolConfig, ServerConfig
from nanovllm.errors import InvalidRequestError, UnavailableError
from nanovllm.server import family, health, info, openai, playground, tokens
from nanovllm.server.auth import Authenticate
from nanovllm.server.edge import Edge
from nanovllm.server.errors import to_api_error
from nanovllm.server.limits import RequestLimits
from nanovllm.server.metrics import Metrics
from nanovllm.server.openapi import DescribedAPI
from nanovllm.server.state import ServerState, require_loaded

logger = logging.getLogger(__name__)

MODEL_ROUTERS = (openai.router, tokens.router, info.router, family.router)
HANDLED_ERRORS = (HTTPException, RequestValidationError, InvalidRequestError, UnavailableError)


def create_app(
    server: ServerConfig | None = None,
    engine: EngineConfig | None = None,
    pool: PoolConfig | None = None,
    *,
    llm: AsyncLLM | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        server: Whom it serves, and what it takes at most; None is what the environment says.
        engine: What it serves; likewise.
        pool: How many engines there are; likewise.
        llm: A model that runs already, in place of `engine` and `pool`; its owner closes it.
    """
    server = server or ServerConfig.from_env()
    engine = engine or EngineConfig.from_env()
    pool = pool or PoolConfig.from_env()
    model_id = engine.model_id if llm is None else llm.model_id
    metrics = Metrics((server.served_model_name or [model_id])[0])
    state = ServerState(
        server,
        llm or AsyncLLM.from_config(engine, pool, metrics.requests),
        metrics,
        loaded=llm is not None,
    )
    metrics.watch(state.llm)
    app = DescribedAPI(
        title="nanovllm",
        version=__version__,
        redirect_slashes=False,
        lifespan=_lifespan if llm is None else None,
        middleware=_middleware(server, metrics),
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


def _middleware(server: ServerConfig, metrics: Metrics) -> list[Middleware]:
    """The layers around the routes, outermost first."""
    layers = [Middleware(Edge, metrics=metrics.http)]
    if server.allowed_origins:  # before the keys: browsers ask for permission without one
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=server.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
            )
        )
    if server.api_key:
        layers.append(Middleware(Authenticate, keys=server.api_key))
    return [*layers, Middleware(RequestLimits, config=server)]


async def _answer(request: Request, e: Exception) -> Response:  # noqa: ARG001
    return to_api_error(e).response()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model while the socket is already open, so that /health and /ready answer."""
    state: ServerState = app.state.server
    loading = asyncio.ensure_future(state.llm.start())
    loading.add_done_callback(lambda task: _on_loaded(state, task))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(state.llm.close)
        stack.callback(loading.cancel)
        if state.config.zmq_control:
            control = ControlServer(
                state.config.zmq_control_endpoint,
                state.llm,
                metrics=lambda: health.pool_metrics(state).model_dump(),
            )
            await control.start()
            stack.push_async_callback(control.stop)
        yield


def _on_loaded(state: ServerState, loading: "asyncio.Future[None]") -> None:
    if loading.cancelled():
        return
    state.startup_error = e = loading.exception()
    if e is None:
        state.loaded = True
        for line in _describe(state):
            logger.info("%s", line)
        return
    expected = isinstance(e, ValueError | OSError | RuntimeError | ImportError)
    message = " ".join(str(e).split()) or type(e).__name__
    logger.error("cannot load the model: %s", message, exc_info=None if expected else e)
    signal.raise_signal(signal.SIGTERM)  # ends whatever server runs us


def _describe(state: ServerState) -> list[str]:
    """What has been loaded, and how much it can take on."""
    llm = state.llm
    config, engines = llm.config, llm.stats().workers
    num_blocks = sum(worker.engine.num_kv_blocks for worker in engines)
    block_size = config.block_size or 1
    plural = "" if len(engines) == 1 else "s"
    return [
        f"{', '.join(state.model_names)} on {config.device}, {config.dtype}, {len(engines)} "
        f"engine{plural} of up to {config.max_num_seqs} sequences",
        f"KV cache of {num_blocks:,} blocks, {num_blocks * block_size:,} tokens; a request may "
        f"have {llm.max_model_len:,}",
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
