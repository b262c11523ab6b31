"""Which worker gets a request: one class a policy, without processes and without waiting.

*Cache-aware* dispatch sends a request to the worker with the fewest positions to compute before
and for it:

    outstanding_tokens + num_prompt_tokens - num_matched_tokens

Then the fewest requests in flight win, then whose turn it is. Prefix and load have one unit, so it
takes no threshold to say when a worker is too busy for a prefix it has: once another would be done
sooner although it has to compute it. That one has the prefix from then on and shares the load, so
requests that all have one prefix spread over all workers.

What a worker has cached is guessed from what it was sent: the hashes of the prompts' full blocks,
forgotten in least-recently-sent order once there are more than the worker has KV blocks.
"""

import logging
import random
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from nanovllm.batch import Key
from nanovllm.engine.block_manager import hash_block

logger = logging.getLogger(__name__)

MAX_HASHED_BLOCKS = 512
"""Blocks of a prompt that are hashed; 0.9 ms for all of them, as dispatch is on the event loop."""


class Target(Protocol):
    """A worker as the router sees it.

    Attributes:
        index: Which worker of the pool this is.
        num_inflight: Requests it has.
        outstanding_tokens: Positions it has yet to compute for them, without those it has cached
            and with no more output than a request can be expected to have.
        num_kv_blocks: Blocks of its KV cache.
        block_size: Positions in a block.
    """

    @property
    def index(self) -> int: ...
    @property
    def num_inflight(self) -> int: ...
    @property
    def outstanding_tokens(self) -> int: ...
    @property
    def num_kv_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...


T = TypeVar("T", bound=Target)
Cost = tuple[int, int]


class Router(ABC):
    """Picks a worker for each request; ties are broken round-robin."""

    def __init__(self) -> None:
        self._last = -1

    @abstractmethod
    def pick(self, targets: Sequence[T], keys: Sequence[Key], root: bytes, /) -> T:
        """Choose who gets a request.

        Args:
            targets: Those that may take a request now, at least one.
            keys: The prompt.
            root: What its first block is chained to: `root_hash` of model, adapter and salt.
        """

    def sent(self, target: Target, keys: Sequence[Key], root: bytes, /) -> int:  # noqa: ARG002
        """Note that the target got this prompt.

        Returns:
            Positions of it that the target is thought to have cached; always short of the last.
        """
        return 0

    def forget(self, index: int, /) -> None:  # noqa: B027 - most policies remember nothing
        """Note that this worker was restarted, and so has nothing cached any more."""

    def _cheapest(self, targets: Sequence[T], cost: Callable[[T], Cost]) -> T:
        chosen = min(targets, key=lambda t: (cost(t), t.index <= self._last, t.index))
        self._last = chosen.index
        return chosen


class RoundRobinRouter(Router):
    """Takes the targets in turn."""

    def pick(self, targets: Sequence[T], /, *_: object) -> T:
        return self._cheapest(targets, lambda _: (0, 0))


def _load(target: Target) -> Cost:
    return target.outstanding_tokens, target.num_inflight


class LeastLoadedRouter(Router):
    """Takes the target with the fewest outstanding tokens."""

    def pick(self, targets: Sequence[T], /, *_: object) -> T:
        return self._cheapest(targets, _load)


class RandomRouter(Router):
    """Takes the less loaded of two targets drawn at random.

    Two choices keep the longest queue near log(log(n)) where one choice lets it grow to log(n)
    (Mitzenmacher 2001), and routers that do not know of each other do not all choose the same.

    Args:
        seed: Of the draws; None takes the operating system's.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._draws = random.Random(seed)

    def pick(self, targets: Sequence[T], /, *_: object) -> T:
        return self._cheapest(self._draws.sample(targets, min(2, len(targets))), _load)


class CacheAwareRouter(Router):
    """Takes the target with the fewest positions to compute before and for a request.

    The hashes a target is known to have are closed under prefix: a prompt's first block is noted
    last and so outlives the others. Hence the longest match is found by bisection.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, OrderedDict[bytes, None]] = {}
        self._hashed: tuple[Sequence[Key], bytes, int] = ((), b"", 0)
        self._hashes: list[bytes] = []

    def pick(self, targets: Sequence[T], keys: Sequence[Key], root: bytes, /) -> T:
        def cost(target: T) -> Cost:
            num_uncached = len(keys) - self._num_matched(target, keys, root)
            return target.outstanding_tokens + num_uncached, target.num_inflight

        return self._cheapest(targets, cost)

    def sent(self, target: Target, keys: Sequence[Key], root: bytes, /) -> int:
        num_matched = self._num_matched(target, keys, root)
        known = self._known.setdefault(target.index, OrderedDict())
        for digest in reversed(self._hashes_of(keys, root, target.block_size)):
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > target.num_kv_blocks:
            known.popitem(last=False)
        return num_matched

    def forget(self, index: int, /) -> None:
        self._known.pop(index, None)

    def _num_matched(self, target: Target, keys: Sequence[Key], root: bytes) -> int:
        """Positions of a prompt that the target is believed to have, always short of the last."""
        known = self._known.get(target.index)
        if not known:
            return 0
        size = target.block_size
        hashes = self._hashes_of(keys, root, size)
        high = min(len(hashes), (len(keys) - 1) // size)
        return size * bisect_left(hashes, True, hi=high, key=lambda digest: digest not in known)

    def _hashes_of(self, keys: Sequence[Key], root: bytes, block_size: int) -> list[bytes]:
        """The chained hashes of the prompt's full blocks, kept until the next prompt comes."""
        hashed_ids, *rest = self._hashed
        if hashed_ids is not keys or rest != [root, block_size]:
            self._hashed = (keys, root, block_size)
            self._hashes = []
            end = min(len(keys) // block_size, MAX_HASHED_BLOCKS) * block_size
            for start in range(0, end, block_size):
                root = hash_block(root, list(keys[start : start + block_size]))
                self._hashes.append(root)
        return self._hashes


POLICIES: dict[str, type[Router]] = {
    "round_robin": RoundRobinRouter,
    "least_loaded": LeastLoadedRouter,
    "random": RandomRouter,
    "cache_aware": CacheAwareRouter,
}
POLICY_ALIASES = {"rr": "round_robin", "fsfs": "least_loaded"}


def policy_name(policy: str) -> str:
    """Return our name of a policy; one that is unknown is logged, and is "round_robin"."""
    name = policy.strip().lower().replace("-", "_")
    name = POLICY_ALIASES.get(name, name)
    if name in POLICIES:
        return name
    logger.warning(
        "no dispatch policy is named %r, so requests go round robin; there are %s",
        policy,
        ", ".join([*POLICIES, *POLICY_ALIASES]),
    )
    return "round_robin"


def make_router(policy: str, seed: int | None = None) -> Router:
    """Return a router by the name of its policy, see `policy_name`.

    Args:
        policy: "round_robin" ("rr"), "least_loaded" ("fsfs"), "random" or "cache_aware"; the last
            hashes every prompt, so a pool of one worker does better without.
        seed: Of the random policy's draws.
    """
    name = policy_name(policy)
    return RandomRouter(seed) if name == "random" else POLICIES[name]()
