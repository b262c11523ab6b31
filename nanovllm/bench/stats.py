"""What the records of a load test amount to."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanovllm.bench.load import ClientLoad, Record
from nanovllm.bench.serve_config import Load

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end to end",
}
MAX_LAG = 0.02
"""A loop that is later than this, one time in a hundred, makes latencies doubtful."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """Of some values, interpolated as numpy does; None of none."""
        if not values:
            return None
        ordered = sorted(values)
        mean = sum(ordered) / len(ordered)
        return cls(mean, *(percentile(ordered, share) for share in (0.5, 0.9, 0.99, 1.0)))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which lies this share of some ordered values, interpolated linearly."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Figures of one load. Times are in seconds; latencies are those of completed requests.

    Args:
        load: What was offered.
        num_requests: Requests sent.
        num_completed: Of these, answered whole.
        num_good: Of these, within the service level objective; None without one.
        errors: How many of the others failed in which way.
        first_error: What the server said of one of them.
        duration: From the first request to the last answer.
        num_prompt_tokens: Of completed requests, as the server counts.
        num_cached_tokens: Of these, tokens from the server's prefix cache.
        num_output_tokens: Of completed requests, as the server counts.
        ttft: Time to the first token, from when a request was to be sent.
        tpot: Time per output token after the first, a value a request.
        itl: Gaps between events with tokens; an event may carry several.
        e2e: Time to the last token.
        late: How much later than intended requests were sent.
        loop_lag: How late the client's event loop was.
        client_cpu: Share of a core that the client took.
        samples: `ttft`, `tpot` and `e2e` of each completed request, each sorted.
    """

    load: Load
    num_requests: int
    num_completed: int
    num_good: int | None
    errors: dict[str, int]
    first_error: str | None
    duration: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    late: Distribution | None
    loop_lag: Distribution | None
    client_cpu: float
    samples: dict[str, list[float]]

    @property
    def request_throughput(self) -> float:
        """Completed requests per second."""
        return self.num_completed / self.duration

    @property
    def output_throughput(self) -> float:
        """Generated tokens per second."""
        return self.num_output_tokens / self.duration

    @property
    def total_throughput(self) -> float:
        """Tokens in and out per second."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.duration

    @property
    def goodput(self) -> float | None:
        """Requests per second that met the objective."""
        return None if self.num_good is None else self.num_good / self.duration

    @property
    def is_client_slow(self) -> bool:
        """Whether the client was late so often that its figures blame the server for it."""
        return self.loop_lag is not None and self.loop_lag.p99 > MAX_LAG

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON; as that has no infinity, the rate of all at once is null."""
        rates = ("request_throughput", "output_throughput", "total_throughput", "goodput")
        figures = asdict(self) | {name: getattr(self, name) for name in rates}
        if math.isinf(self.load.request_rate):
            figures["load"]["request_rate"] = None
        return figures


def summarize(
    records: Sequence[Record], client: ClientLoad, load: Load, slo: Mapping[str, float]
) -> LoadResult:
    """Work out the figures of a load; `slo` is what `parse_slo` read."""
    done = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    start = min(record.intended for record in records)
    end = max(record.ended or record.sent for record in done or records)
    samples = {
        "ttft": sorted(record.ttft for record in done),
        "tpot": sorted(tpot for record in done if (tpot := record.tpot) is not None),
        "e2e": sorted(record.e2e for record in done),
    }
    return LoadResult(
        load=load,
        num_requests=len(records),
        num_completed=len(done),
        num_good=sum(_meets(record, slo) for record in done) if slo else None,
        errors=dict(Counter(str(record.error) for record in failed)),
        first_error=failed[0].detail if failed else None,
        duration=max(end - start, 1e-9),
        num_prompt_tokens=sum(record.num_prompt_tokens for record in done),
        num_cached_tokens=sum(record.num_cached_tokens for record in done),
        num_output_tokens=sum(record.num_output_tokens for record in done),
        ttft=Distribution.of(samples["ttft"]),
        tpot=Distribution.of(samples["tpot"]),
        itl=Distribution.of([gap for record in done for gap in record.itls]),
        e2e=Distribution.of(samples["e2e"]),
        late=Distribution.of([record.sent - record.intended for record in records]),
        loop_lag=Distribution.of(client.lags),
        client_cpu=client.cpu_share,
        samples=samples,
    )


def _meets(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether a request kept to every limit; one of a single token has no time per token."""
    times = ((getattr(record, name), limit) for name, limit in slo.items())
    return all(value is None or value <= limit for value, limit in times)
