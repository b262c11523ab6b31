"""What the server counts of speech, under the family's names."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

TTFB_BUCKETS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5, 5.0, 10.0)
ENCODE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class AudioMetrics:
    """Speech that was sent, and recordings that were taken in.

    Args:
        registry: Where the series go.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ttfb = Histogram(
            "nanovllm_generate_ttfb_seconds",
            "From the arrival of a request for speech to its first bytes of sound.",
            registry=registry,
            buckets=TTFB_BUCKETS,
        )
        self.audio_seconds = Counter(
            "nanovllm_generate_audio_seconds", "Seconds of speech made.", registry=registry
        )
        self.stream_bytes = Counter(
            "nanovllm_generate_stream_bytes", "Bytes of speech sent.", registry=registry
        )
        self.encode_failures = Counter(
            "nanovllm_audio_encode_failures",
            "Answers that broke off because speech could not be written in their format.",
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "nanovllm_audio_encode_seconds",
            "Time that an answer took to be written in its format, such as MP3.",
            registry=registry,
            buckets=ENCODE_BUCKETS,
        )
        self.latents_requests = Counter(
            "nanovllm_encode_latents_requests",
            "Recordings that were to be encoded, by the status of the answer.",
            ["status"],
            registry=registry,
        )
        self.latents_duration = Histogram(
            "nanovllm_encode_latents_duration_seconds",
            "From a recording to its latents.",
            registry=registry,
            buckets=ENCODE_BUCKETS,
        )

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Count and time a recording that is being encoded."""
        start = time.monotonic()
        status = "error"
        try:
            yield
            status = "ok"
        finally:
            self.latents_requests.labels(status).inc()
            self.latents_duration.observe(time.monotonic() - start)
