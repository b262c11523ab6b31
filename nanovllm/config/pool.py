"""Options of a pool of engines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nanovllm.config.options import Options
from nanovllm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(Options):
    """How many engines there are, who gets the next request, and how many are let in.

    Args:
        devices: CUDA devices, one engine in its own process on each, or on as many as
            `tensor_parallel_size` says, in order; None is one engine on what `device` says.
        replicas: Engines without `devices`; on a CPU they share its cores evenly.
        dispatch_policy: "cache_aware", "least_loaded" (family: "fsfs"), "round_robin" ("rr") or
            "random", the better of two; another name warns and is "round_robin".
        max_inflight_total: Requests handed to the engines at a time; the others wait in line for
            up to `queue_timeout`. 0 is no limit.
        max_inflight_per_engine: The same for each engine.
        queue_timeout: Seconds a request waits in that line before it is refused.
        max_num_queued_reqs: Completions that may wait for an engine to run them; more are refused.
            None is four times what the engines run at a time.
        max_num_queued_tokens: Prompt tokens that may wait so; None is the larger of 2**20 and
            eight times the context.
        queue_coalesce_ms: Milliseconds, at most 50, that an idle engine waits after a request for
            others to start in the same step.
        step_timeout: Seconds without a step, while there is work, after which an engine counts as
            hung and is started anew.
        max_unread_seconds: Seconds of speech that a request may be ahead of its reader; it is held
            back from then on.
        unread_timeout: Seconds without a read after which a request that is held back is ended.
        adaptive_max_new_tokens: Whether `max_tokens` shrinks while many requests are in flight.
        adaptive_max_inflight_threshold: Requests in flight from which `max_tokens` shrinks; None is
            the number of engines.
        adaptive_max_new_tokens_factor: Share of `max_tokens` that is left then, at least 0.1.
        metric_window: Requests over which the pool's averages go.
        warm_prefixes: Texts whose KV blocks are computed at start; in the environment and on the
            command line one string, separated by `||`.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    devices: list[int] | None = None
    replicas: int = 1
    dispatch_policy: str = "cache_aware"
    max_inflight_total: int = 0
    max_inflight_per_engine: int = 0
    queue_timeout: float = 60.0
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    queue_coalesce_ms: float = 2.0
    step_timeout: float = 300.0
    max_unread_seconds: float = 30.0
    unread_timeout: float = 60.0
    adaptive_max_new_tokens: bool = False
    adaptive_max_inflight_threshold: int | None = None
    adaptive_max_new_tokens_factor: float = 0.8
    metric_window: int = 50
    warm_prefixes: str | None = None

    environment_aliases: ClassVar[Mapping[str, str]] = {
        "SCHEDULER_MODE": "dispatch_policy",
        "DP_SIZE": "replicas",
        "MAX_INFLIGHT_TOTAL": "max_inflight_total",
        "MAX_INFLIGHT_PER_ENGINE": "max_inflight_per_engine",
        "ADAPTIVE_MAX_NEW_TOKENS": "adaptive_max_new_tokens",
        "ADAPTIVE_MAX_INFLIGHT_THRESHOLD": "adaptive_max_inflight_threshold",
        "ADAPTIVE_MAX_NEW_TOKENS_FACTOR": "adaptive_max_new_tokens_factor",
        "METRIC_WINDOW": "metric_window",
        "WARM_PREFIXES": "warm_prefixes",
    }

    def __post_init__(self) -> None:
        self._check_types()
        self._check_range(1, "replicas", "metric_window")
        self._check_range(0, "max_inflight_total", "max_inflight_per_engine", "queue_timeout")
        self._check_range(0, "max_num_queued_reqs", "max_num_queued_tokens")
        self._check_range(0, "adaptive_max_inflight_threshold")
        self._check_range(0, "queue_coalesce_ms", high=50)
        self._check_range(0.001, "step_timeout", "unread_timeout")
        self._check_range(1, "max_unread_seconds")
        self._check_range(0.1, "adaptive_max_new_tokens_factor", high=1)
        devices = self.devices
        if devices is not None and (
            not devices or min(devices) < 0 or len(set(devices)) < len(devices)
        ):
            raise InvalidRequestError(
                f"devices must be different device numbers, got {devices}", "devices"
            )
        if devices is not None and len(devices) % self.replicas:
            raise InvalidRequestError(
                f"devices={devices} say how many engines there are: leave "
                f"replicas={self.replicas} out",
                "replicas",
            )

    def device_groups(self, size: int) -> list[list[int] | None]:
        """The CUDA devices of each engine, None for what `device` says.

        Args:
            size: Devices of an engine.

        Raises:
            InvalidRequestError: There are not as many as some engines need, or they make another
                number of engines than `replicas`.
        """
        if self.devices is None:
            return [None] * self.replicas
        if len(self.devices) % size:
            raise InvalidRequestError(
                f"devices={self.devices} must be a multiple of tensor_parallel_size={size}, the "
                "devices of an engine",
                "devices",
            )
        starts = range(0, len(self.devices), size)
        if self.replicas not in (1, len(starts)):
            raise InvalidRequestError(
                f"devices={self.devices} say how many engines there are, {len(starts)}: leave "
                f"replicas={self.replicas} out",
                "replicas",
            )
        return [self.devices[start : start + size] for start in starts]
