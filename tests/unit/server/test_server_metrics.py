"""What the server tells of itself: health, and metrics for people and for Prometheus."""

from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from nanovllm import __version__
from nanovllm.cluster.stats import PoolStats, WorkerStats
from nanovllm.config import ServerConfig
from nanovllm.engine.llm_engine import EngineStats
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.app import create_app
from nanovllm.server.metrics import Metrics
from tests.fake_llm import FakeLLM

probe = APIRouter()


@probe.get("/broken/{secret}")
async def fail(secret: str) -> None:
    raise KeyError(secret)


def build(llm: FakeLLM | None = None) -> FastAPI:
    app = create_app(ServerConfig(), llm=llm or FakeLLM())  # type: ignore[arg-type]
    app.include_router(probe)
    return app


class TestHealth:
    def test_alive_and_ready(self) -> None:
        llm = FakeLLM()
        client = TestClient(build(llm))
        assert client.get("/health").json() == client.get("/ready").json() == {"status": "ok"}
        assert client.get("/version").json() == {"version": __version__}
        llm.is_ready = False
        assert client.get("/health").status_code == 200
        response = client.get("/ready")
        assert response.status_code == 503
        assert response.json()["detail"] == "not ready"
        assert response.json()["error"]["code"] == "not_ready"
        assert response.headers["retry-after"]

    def test_while_the_model_is_loaded(self) -> None:
        app = build()
        app.state.server.loaded = False
        client = TestClient(app)
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        for path in ("/metrics", "/metrics.json", "/", "/openapi.json"):
            assert client.get(path).status_code == 200
        for response in (
            client.post("/v1/completions", json={"prompt": "x"}),
            client.get("/v1/models"),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"

    def test_the_pool_as_json(self) -> None:
        llm = FakeLLM()
        engines = [EngineStats(num_running=1, num_kv_blocks=8, num_used_blocks=2) for _ in "ab"]
        engines[0].num_paused = 1
        engines[0].num_prompt_tokens, engines[0].num_cached_tokens = 10, 4
        workers = [WorkerStats(i, "ready", 1, 0, 3, 3, 9, e) for i, e in enumerate(engines)]
        llm.stats = lambda: PoolStats("rr", workers, 6, 6, 0.5, 20.0)  # type: ignore[method-assign]
        client = TestClient(build(llm))
        pool = client.get("/metrics.json").json()
        assert client.get("/metrics", headers={"Accept": "application/json"}).json() == pool
        assert pool.pop("engines")[1]["num_kv_blocks"] == 8
        assert pool == {
            "scheduler": "rr",
            "pool_size": 2,
            "inflight_total": 6,
            "inflight_per_engine": [3, 3],
            "cache": {
                "prefill_hits": 0,
                "prefill_misses": 0,
                "prefix_hits": 4,
                "prefix_misses": 6,
            },
            "avg_latency_s": 0.5,
            "avg_throughput_tok_s": 20.0,
            "num_running": 2,
            "num_waiting": 4,
            "kv_cache_usage": 0.25,
            "generation_tokens": 0,
        }
        text = client.get("/metrics").text
        assert 'vllm:num_requests_running{engine="1",model_name="demo_model"} 1.0' in text
        assert 'nanovllm_num_requests_paused{engine="0",model_name="demo_model"} 1.0' in text
        assert 'vllm:kv_cache_usage_perc{engine="0",model_name="demo_model"} 0.25' in text
        assert 'vllm:prefix_cache_hits_total{engine="0",model_name="demo_model"} 4.0' in text


VLLM_SERIES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
    "admission_rejections",
    "corrupted_requests",
    "prompt_tokens_cached",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "request_params_n",
    "request_params_max_tokens",
]


class TestMetrics:
    def value(self, metrics: Metrics, name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model_name": "m"} | labels)

    def test_every_name_of_vllm_is_there(self) -> None:
        text = TestClient(build()).get("/metrics").text
        missing = [name for name in VLLM_SERIES if f"# TYPE vllm:{name}" not in text]
        assert not missing

    def test_a_request_from_its_arrival_to_its_end(self) -> None:
        metrics = Metrics()
        watch = metrics.requests_of("m")
        done = [CompletionOutput(i, token_ids=[7] * 3, finish_reason="stop") for i in (0, 1)]
        output = RequestOutput(
            "id", "x", [1, 2, 3, 4], done, RequestMetrics(10.0, 10.5, 11.0, 13.0)
        )
        output.num_cached_tokens = 3
        watch.received(output, SamplingParams(n=2, max_tokens=5))
        watch.tokens(output, 2, 11.0)
        watch.tokens(output, 2, 11.25)
        watch.tokens(output, 2, 11.75)
        watch.stepped(17, 12.0)
        watch.finished(output)
        watch.rejected("tokens")
        for name, value in {
            "prompt_tokens_total": 4,
            "prompt_tokens_cached_total": 3,
            "generation_tokens_total": 6,
            "time_to_first_token_seconds_sum": 1.0,
            "inter_token_latency_seconds_count": 2,
            "inter_token_latency_seconds_sum": 0.75,
            "e2e_request_latency_seconds_sum": 3.0,
            "request_queue_time_seconds_sum": 0.5,
            "request_prefill_time_seconds_sum": 0.5,
            "request_decode_time_seconds_sum": 2.0,
            "request_prompt_tokens_sum": 4,
            "request_generation_tokens_sum": 6,
            "request_params_n_sum": 2,
            "request_params_max_tokens_sum": 5,
            "iteration_tokens_total_sum": 17,
        }.items():
            assert self.value(metrics, f"vllm:{name}") == value, name
        assert self.value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
        assert self.value(metrics, "vllm:admission_rejections_total", reason="tokens") == 1

    def test_an_embedding_has_a_prompt_and_no_tokens(self) -> None:
        metrics = Metrics()
        watch = metrics.requests_of("m")
        times = RequestMetrics(10.0, 10.5, 11.0, 11.0)
        done = [CompletionOutput(0, finish_reason="stop")]
        output = RequestOutput("id", None, [1] * 40, done, times, num_cached_tokens=16)
        watch.received(output, SamplingParams(max_tokens=1))
        watch.finished(output)
        for name, value in {
            "prompt_tokens_total": 40,
            "prompt_tokens_cached_total": 16,
            "generation_tokens_total": 0,
            "time_to_first_token_seconds_count": 0,
            "e2e_request_latency_seconds_count": 1,
        }.items():
            assert self.value(metrics, f"vllm:{name}") == value, name

    def test_a_request_that_never_ran(self) -> None:
        metrics = Metrics()
        output = RequestOutput("id", "x", [1], [CompletionOutput(0)], RequestMetrics(1.0))
        metrics.requests_of("m").finished(output)
        assert self.value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
        assert self.value(metrics, "vllm:e2e_request_latency_seconds_count") == 0

    def test_nothing_is_kept_of_a_request(self) -> None:
        metrics = Metrics()
        for number in range(100):
            times = RequestMetrics(1.0, 1.0, 1.0, 2.0)
            output = RequestOutput(str(number), "x", [1], [CompletionOutput(0)], times)
            metrics.requests_of("m").tokens(output, 1, 2.0)
            metrics.requests_of("m").finished(output)
        assert not metrics.requests_of("m")._last_news

    def test_routes_not_paths(self) -> None:
        app = build()
        client = TestClient(app)
        for number in range(20):
            client.get(f"/broken/{number}")
            client.get(f"/made-up/{number}")
            client.request(f"MADE{number}", "/health")
        sample = app.state.server.metrics.registry.get_sample_value
        route = "/broken/{secret}"
        labels = {"route": route, "method": "GET", "status": "500"}
        assert sample("nanovllm_http_requests_total", labels) == 20
        labels = {"route": "unmatched", "method": "GET", "status": "404"}
        assert sample("nanovllm_http_requests_total", labels) == 20
        labels = {"route": "/health", "method": "other", "status": "405"}
        assert sample("nanovllm_http_requests_total", labels) == 20
        labels = {"route": route, "exception_type": "KeyError"}
        assert sample("nanovllm_exceptions_total", labels) == 20
        assert sample("nanovllm_inflight_requests", {"route": route}) == 0
        labels = {"route": route, "method": "GET"}
        assert sample("nanovllm_http_request_duration_seconds_count", labels) == 20

    def test_the_format_is_one_that_keeps_the_names(self) -> None:
        client = TestClient(build())
        for accept in (
            "*/*",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;q=0.5",
        ):
            response = client.get("/metrics", headers={"Accept": accept})
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert "\nvllm:generation_tokens_total{" in response.text

    def test_counters_by_reason_begin_with_zero(self) -> None:
        text = TestClient(build()).get("/metrics").text
        for name, label, reasons in (
            ("request_success", "finished_reason", ("stop", "length", "abort", "error")),
            ("admission_rejections", "reason", ("requests", "tokens", "timeout", "not_ready")),
        ):
            lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}_total{{")]
            assert all(line.endswith(" 0.0") for line in lines)
            for reason in reasons:
                assert any(f'{label}="{reason}"' in line for line in lines)
