"""How the server is: /health, /ready, /version, /metrics and /metrics.json."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from pydantic import BaseModel, Field

from nanovllm import __version__
from nanovllm.cluster.stats import WorkerStats
from nanovllm.errors import NotReadyError
from nanovllm.server.errors import ErrorInfo, to_api_error
from nanovllm.server.state import ServerState, State

router = APIRouter(tags=["server"])


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"


class NotReady(BaseModel):
    """No requests are taken now."""

    detail: str
    error: ErrorInfo


class Version(BaseModel):
    """What runs here."""

    version: str


class CacheMetrics(BaseModel):
    """How often prompts were found in the KV cache."""

    prefill_hits: int = Field(description="Requests that found a prefix of their prompt.")
    prefill_misses: int = Field(description="Requests that found none.")
    prefix_hits: int = Field(description="Prompt tokens that were found.")
    prefix_misses: int = Field(description="Prompt tokens that were computed.")


class EngineMetrics(BaseModel):
    """One engine."""

    model: str
    index: int
    state: str = Field(description="starting, ready or dead.")
    num_restarts: int
    num_inflight: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_kv_blocks: int


class PoolMetrics(BaseModel):
    """The engines, in one JSON object."""

    scheduler: str = Field(description="Who gets the next request.")
    pool_size: int
    inflight_total: int
    inflight_per_engine: list[int]
    cache: CacheMetrics
    avg_latency_s: float = Field(description="Over the last `metric_window` requests.")
    avg_throughput_tok_s: float = Field(description="Of a request, over the same ones.")
    num_running: int
    num_waiting: int
    kv_cache_usage: float = Field(description="Share of the KV blocks in use, 1 is all.")
    generation_tokens: int = Field(description="Tokens and patches of speech generated so far.")
    engines: list[EngineMetrics]


@router.get("/health")
async def health() -> Status:
    """Whether the process lives; it does while it answers."""
    return Status()


@router.get("/ready", responses={503: {"model": NotReady}}, response_model=Status)
async def ready(state: State) -> Status | Response:
    """Whether requests are taken: not while the model is loaded, nor while the server drains."""
    if state.is_ready:
        return Status()
    return to_api_error(NotReadyError("not ready")).response(detail="not ready")


@router.get("/version")
async def version() -> Version:
    """The version of nanovllm."""
    return Version(version=__version__)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' text format, or what /metrics.json has if JSON is asked "
            "for.",
            "model": PoolMetrics,
            "content": {"text/plain": {}},
        }
    },
)
async def metrics(state: State, request: Request) -> Response:
    """Counters for Prometheus; the pool's as JSON with `Accept: application/json`."""
    accept = request.headers.get("accept", "")
    if "application/json" in accept:
        return Response(pool_metrics(state).model_dump_json(), media_type="application/json")
    # Whatever else is asked for: the library's OpenMetrics makes `vllm:x` into `vllm_x`.
    series = generate_latest(state.metrics.registry)
    return Response(series, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


@router.get("/metrics.json")
async def metrics_json(state: State) -> PoolMetrics:
    """The pool's counters."""
    return pool_metrics(state)


def pool_metrics(state: ServerState) -> PoolMetrics:
    """What the engines are doing, for people and scripts without Prometheus."""
    stats, requests = state.stats(), state.metrics.requests.values()
    engines = [worker.engine for worker in stats.workers]
    num_cached = sum(engine.num_cached_tokens for engine in engines)
    return PoolMetrics(
        scheduler=stats.dispatch_policy,
        pool_size=len(stats.workers),
        inflight_total=stats.num_inflight,
        inflight_per_engine=[worker.num_inflight for worker in stats.workers],
        cache=CacheMetrics(
            prefill_hits=sum(of_model.num_prefix_hits for of_model in requests),
            prefill_misses=sum(of_model.num_prefix_misses for of_model in requests),
            prefix_hits=num_cached,
            prefix_misses=sum(engine.num_prompt_tokens for engine in engines) - num_cached,
        ),
        avg_latency_s=stats.avg_latency_s,
        avg_throughput_tok_s=stats.avg_throughput_tok_s,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        kv_cache_usage=stats.kv_usage,
        generation_tokens=sum(of_model.num_generation_tokens for of_model in requests),
        engines=[
            _engine_metrics(name, worker)
            for name, model in state.named_models()
            for worker in model.stats().workers
        ],
    )


def _engine_metrics(model_name: str, worker: WorkerStats) -> EngineMetrics:
    engine = worker.engine
    return EngineMetrics(
        model=model_name,
        index=worker.index,
        state=worker.state,
        num_restarts=worker.num_restarts,
        num_inflight=worker.num_inflight,
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        num_used_blocks=engine.num_used_blocks,
        num_kv_blocks=engine.num_kv_blocks,
    )
