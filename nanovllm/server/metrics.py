"""What the server counts, for Prometheus: vLLM's names where it has one, else `nanovllm_*`."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm.cluster.stats import WorkerStats
from nanovllm.config import DEFAULT_BLOCK_SIZE
from nanovllm.outputs import RequestOutput, SpeechOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.audio_metrics import AudioMetrics
from nanovllm.server.state import ServerState

Family = GaugeMetricFamily | CounterMetricFamily
Output = RequestOutput | SpeechOutput

ENGINE_LABELS = ("model_name", "engine")
WAITING = "vllm:num_requests_waiting"

# vLLM's buckets, so that its dashboards fit.
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
STEP_BUCKETS = (1, 8, *(2**e for e in range(4, 15)))
N_BUCKETS = (1, 2, 5, 10, 20)

FINISHED_REASONS = ("stop", "length", "abort", "error")
REJECTION_REASONS = ("requests", "tokens", "timeout", "not_ready")


class Families:
    """The series of all models, each made when the first of them asks for it.

    Args:
        registry: Where they go.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str, says: str, *labels: str) -> Counter:
        if name not in self._counters:
            every = ["model_name", *labels]
            self._counters[name] = Counter(name, says, every, registry=self._registry)
        return self._counters[name]

    def histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        if name not in self._histograms:
            self._histograms[name] = Histogram(
                name, says, ["model_name"], registry=self._registry, buckets=buckets
            )
        return self._histograms[name]


class RequestMetrics:
    """What becomes of the requests for one model; an `Observer`. Patches of speech are tokens.

    Args:
        families: Where the series are.
        model_name: Label of them all.
    """

    def __init__(self, families: Families, model_name: str) -> None:
        self._model_name = model_name

        def counter(name: str, says: str) -> Counter:
            return families.counter(name, says).labels(model_name)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            return families.histogram(name, says, buckets).labels(model_name)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of started requests.")
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Of these, found cached.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.success = families.counter(
            "vllm:request_success", "Requests that ended.", "finished_reason"
        )
        self.rejections = families.counter(
            "vllm:admission_rejections", "Requests refused for want of room.", "reason"
        )
        # A rate needs a value to start from.
        for reason in FINISHED_REASONS:
            self.success.labels(model_name, reason)
        for reason in REJECTION_REASONS:
            self.rejections.labels(model_name, reason)
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS
        )
        self.itl = histogram(
            "vllm:inter_token_latency_seconds", "From one step's tokens to the next.", ITL_BUCKETS
        )
        self.e2e = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", LATENCY_BUCKETS
        )
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", LATENCY_BUCKETS
        )
        self.prefill_time = histogram(
            "vllm:request_prefill_time_seconds",
            "From the first step to the first token.",
            LATENCY_BUCKETS,
        )
        self.decode_time = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the end.", LATENCY_BUCKETS
        )
        self.request_prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS
        )
        self.params_n = histogram("vllm:request_params_n", "n of a request.", N_BUCKETS)
        self.params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "max_tokens of a request.", TOKEN_BUCKETS
        )
        self.iteration_tokens = histogram(
            "vllm:iteration_tokens_total", "Positions computed in a step.", STEP_BUCKETS
        )
        self._last_news: dict[str, float] = {}
        self.num_prefix_hits = 0
        self.num_prefix_misses = 0
        self.num_generation_tokens = 0

    def received(self, output: Output, params: SamplingParams) -> None:
        self.request_prompt_tokens.observe(output.num_prompt_tokens)
        self.params_n.observe(params.n)
        if params.max_tokens is not None:
            self.params_max_tokens.observe(params.max_tokens)

    def tokens(self, output: Output, num_new: int, now: float) -> None:
        self.generation_tokens.inc(num_new)
        self.num_generation_tokens += num_new
        last = self._last_news.get(output.request_id)
        self._last_news[output.request_id] = now
        if last is not None:
            self.itl.observe(now - last)
            return
        self.ttft.observe(now - output.metrics.arrival_time)
        self._count_prompt(output)

    def _count_prompt(self, output: Output) -> None:
        self.prompt_tokens.inc(output.num_prompt_tokens)
        self.cached_tokens.inc(output.num_cached_tokens)
        if output.num_cached_tokens:
            self.num_prefix_hits += 1
        else:
            self.num_prefix_misses += 1

    def finished(self, output: Output) -> None:
        has_tokens = self._last_news.pop(output.request_id, None) is not None
        if not has_tokens and output.metrics.first_token_time is not None:  # an embedding
            self._count_prompt(output)
        self.success.labels(self._model_name, output.finish_reason or "abort").inc()
        self.request_generation_tokens.observe(output.num_tokens)
        times = output.metrics
        for histogram, start, end in (
            (self.e2e, times.arrival_time, times.finished_time),
            (self.queue_time, times.arrival_time, times.first_scheduled_time),
            (self.prefill_time, times.first_scheduled_time, times.first_token_time),
            (self.decode_time, times.first_token_time, times.finished_time),
        ):
            if start is not None and end is not None:
                histogram.observe(end - start)

    def rejected(self, reason: str) -> None:
        self.rejections.labels(self._model_name, reason).inc()

    def stepped(self, num_positions: int, now: float) -> None:  # noqa: ARG002
        self.iteration_tokens.observe(num_positions)


class HTTPMetrics:
    """What becomes of the HTTP requests; a route is always a template, never a client's text."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "nanovllm_http_requests",
            "Requests answered; status 499 is a client that left before there was an answer.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.duration = Histogram(
            "nanovllm_http_request_duration_seconds",
            "From a request's head to the end of its answer, streaming included.",
            ["route", "method"],
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self.inflight = Gauge(
            "nanovllm_inflight_requests", "Requests open.", ["route"], registry=registry
        )
        self.exceptions = Counter(
            "nanovllm_exceptions",
            "Exceptions that no route has handled.",
            ["route", "exception_type"],
            registry=registry,
        )


ENGINE_FIGURES: tuple[tuple[type[Family], str, str, Callable[[WorkerStats], float]], ...] = (
    (
        GaugeMetricFamily,
        "vllm:num_requests_running",
        "Sequences that run.",
        lambda worker: worker.engine.num_running,
    ),
    (
        GaugeMetricFamily,
        WAITING,
        "Sequences that wait to run; those in line for an engine are on none yet.",
        lambda worker: worker.num_waiting,
    ),
    (
        GaugeMetricFamily,
        "nanovllm_num_requests_paused",
        "Sequences that are paused because their client does not read.",
        lambda worker: worker.engine.num_paused,
    ),
    (
        GaugeMetricFamily,
        "vllm:kv_cache_usage_perc",
        "Share of the KV blocks in use, 1 is all.",
        lambda worker: worker.engine.num_used_blocks / max(worker.engine.num_kv_blocks, 1),
    ),
    (
        CounterMetricFamily,
        "vllm:num_preemptions",
        "Sequences that lost their blocks.",
        lambda worker: worker.engine.num_preemptions,
    ),
    (
        CounterMetricFamily,
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up.",
        lambda worker: worker.engine.num_prompt_tokens,
    ),
    (
        CounterMetricFamily,
        "vllm:prefix_cache_hits",
        "Prompt tokens found cached.",
        lambda worker: worker.engine.num_cached_tokens,
    ),
    (
        CounterMetricFamily,
        "nanovllm_forced_tokens",
        "Tokens generated without a step of their own, as a grammar allowed no other.",
        lambda worker: worker.engine.num_forced_tokens,
    ),
    (
        CounterMetricFamily,
        "vllm:corrupted_requests",
        "Sequences that ended in an error.",
        lambda worker: worker.engine.num_errors,
    ),
)
"""Series of the engines: kind, name, what it says, and how to read it."""


class EngineCollector(Collector):
    """What the engines say of themselves, read when Prometheus asks.

    The labels are the model's name and the engine's number.

    Args:
        state: The server, which may have no models yet.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        models = [(name, model.stats()) for name, model in self._state.named_models()]
        for kind, name, says, read in ENGINE_FIGURES:
            family = kind(name, says, labels=ENGINE_LABELS)
            for model_name, stats in models:
                for worker in stats.workers:
                    family.add_metric([model_name, str(worker.index)], read(worker))
                if name == WAITING:
                    on_engines = sum(worker.num_waiting for worker in stats.workers)
                    in_line = max(stats.num_waiting - on_engines, 0)
                    family.add_metric([model_name, "line"], in_line)
            yield family
        yield self._cache_info()

    def _cache_info(self) -> Metric:
        facts = ("block_size", "num_gpu_blocks", "cache_dtype")
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache.", labels=[*ENGINE_LABELS, *facts]
        )
        for name, model in self._state.named_models():
            block_size = str(model.config.block_size or DEFAULT_BLOCK_SIZE)
            for worker in model.stats().workers:
                labels = [name, str(worker.index), block_size, str(worker.engine.num_kv_blocks)]
                info.add_metric([*labels, model.config.kv_cache_dtype], 1)
        return info


class Metrics:
    """All series of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = HTTPMetrics(self.registry)
        self.audio = AudioMetrics(self.registry)
        self.requests: dict[str, RequestMetrics] = {}
        self._families = Families(self.registry)
        ProcessCollector(registry=self.registry)

    def requests_of(self, model_name: str) -> RequestMetrics:
        """Those of the requests for one model."""
        if model_name not in self.requests:
            self.requests[model_name] = RequestMetrics(self._families, model_name)
        return self.requests[model_name]

    def watch(self, state: ServerState) -> None:
        """Show what the models' engines say of themselves, too."""
        for name, _ in state.named_models():
            self.requests_of(name)
        self.registry.register(EngineCollector(state))
