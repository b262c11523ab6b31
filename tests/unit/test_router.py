"""Dispatch policies: who gets a request, what is remembered of it, and that nobody is swamped."""

import logging
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.batch import Key
from nanovllm.cluster.router import (
    MAX_HASHED_BLOCKS,
    POLICIES,
    CacheAwareRouter,
    RoundRobinRouter,
    Router,
    make_router,
    policy_name,
)
from nanovllm.engine.block_manager import hash_block, root_hash

BLOCK_SIZE = 16
ROOT = root_hash("model", None, None)


@dataclass
class StubTarget:
    """A worker of which only the load is there."""

    index: int
    num_inflight: int = 0
    outstanding_tokens: int = 0
    num_kv_blocks: int = 1000
    block_size: int = BLOCK_SIZE


def stubs(count: int, **options: int) -> list[StubTarget]:
    return [StubTarget(index, **options) for index in range(count)]


def prompt(seed: int, length: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(150_000) for _ in range(length)]


def send(
    router: Router, targets: list[StubTarget], token_ids: list[int], root: bytes = ROOT
) -> StubTarget:
    target = router.pick(targets, token_ids, root)
    router.sent(target, token_ids, root)
    return target


def queue(router: Router, targets: list[StubTarget], token_ids: list[int], output: int) -> int:
    """Send a request that stays; return whom to."""
    target = router.pick(targets, token_ids, ROOT)
    num_cached = router.sent(target, token_ids, ROOT)
    target.num_inflight += 1
    target.outstanding_tokens += len(token_ids) - num_cached + output
    return target.index


@pytest.mark.parametrize("name", ["round_robin", "rr", "RR", " round-robin "])
def test_round_robin_takes_turns(name: str) -> None:
    router, targets = make_router(name), stubs(3)
    assert [send(router, targets, [1]).index for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_goes_on_when_a_worker_is_left_out() -> None:
    router, targets = make_router("rr"), stubs(4)
    assert send(router, targets, [1]).index == 0
    assert [send(router, targets[2:], [1]).index for _ in range(3)] == [2, 3, 2]
    assert send(router, targets, [1]).index == 3


@pytest.mark.parametrize("name", ["least_loaded", "fsfs"])
def test_least_loaded_counts_tokens_then_requests_then_turns(name: str) -> None:
    router, targets = make_router(name), stubs(3)
    targets[0].outstanding_tokens, targets[1].outstanding_tokens = 5, 900
    assert send(router, targets, [1]).index == 2
    targets[2].outstanding_tokens, targets[0].num_inflight, targets[2].num_inflight = 5, 1, 2
    assert send(router, targets, [1]).index == 0
    targets[2].num_inflight = 1
    assert [send(router, targets, [1]).index for _ in range(4)] == [2, 0, 2, 0]


def test_random_takes_the_less_loaded_of_two() -> None:
    router, targets = make_router("random", seed=0), stubs(4)
    targets[3].outstanding_tokens = 1
    counts = Counter(send(router, targets, [1]).index for _ in range(3000))
    assert 3 not in counts  # whoever is drawn beside it has less
    assert all(800 < counts[index] < 1200 for index in range(3))
    assert send(router, targets[3:], [1]).index == 3


def test_random_is_seeded() -> None:
    runs = []
    for seed in (0, 0, 1):
        router, targets = make_router("random", seed), stubs(8)
        runs.append([send(router, targets, [1]).index for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", ["fastest", "", "round robin"])
def test_an_unknown_policy_is_told_and_is_round_robin(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        router = make_router(name)
    assert isinstance(router, RoundRobinRouter)
    (record,) = caplog.records
    assert all(known in record.message for known in (*POLICIES, "rr", "fsfs", repr(name)))


def test_a_known_policy_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for name in POLICIES:
        assert policy_name(name) == name
    assert [policy_name(name) for name in ("rr", "fsfs")] == ["round_robin", "least_loaded"]
    assert not caplog.records


def test_cache_aware_finds_the_longest_prefix() -> None:
    router, targets = make_router("cache_aware"), stubs(3)
    system, story = prompt(0, 64), prompt(1, 64)
    router.sent(targets[1], system, ROOT)
    router.sent(targets[2], system + story, ROOT)
    assert send(router, targets, system + story + prompt(2, 40)).index == 2
    assert send(router, targets, prompt(3, 40)).index == 0  # nobody has it: whose turn it is


def test_cache_aware_says_what_is_cached_already() -> None:
    router, (target,) = make_router("cache_aware"), stubs(1)
    system = prompt(0, 64)
    assert router.sent(target, system, ROOT) == 0
    assert router.sent(target, [*system, 1], ROOT) == 64
    assert router.sent(target, system, ROOT) == 48  # the last position is always computed
    assert router.sent(target, system[:63], ROOT) == 48
    assert router.sent(target, system[:15], ROOT) == 0


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "random"])
def test_the_other_policies_expect_nothing_to_be_cached(policy: str) -> None:
    router, (target,) = make_router(policy), stubs(1)
    assert [router.sent(target, prompt(0, 64), ROOT) for _ in range(2)] == [0, 0]


def test_cache_aware_weighs_the_queue_against_the_prefix() -> None:
    router, targets = make_router("cache_aware"), stubs(2)
    system = prompt(0, 512)
    router.sent(targets[0], system, ROOT)
    targets[0].outstanding_tokens = 511
    assert router.pick(targets, [*system, 1], ROOT) is targets[0]
    targets[0].outstanding_tokens = 513
    assert router.pick(targets, [*system, 1], ROOT) is targets[1]


def test_cache_aware_does_not_mix_salts_or_adapters() -> None:
    router, (target,) = make_router("cache_aware"), stubs(1)
    token_ids = prompt(0, 65)
    roots = [ROOT, root_hash("model", 1, None), root_hash("model", None, "salt")]
    for root in roots:
        assert router.sent(target, token_ids, root) == 0
        assert router.sent(target, token_ids, root) == 64


def test_a_restarted_worker_knows_nothing() -> None:
    router, targets = make_router("cache_aware"), stubs(2)
    for target in targets:
        router.sent(target, prompt(0, 65), ROOT)
    router.forget(0)
    router.forget(7)
    assert router.sent(targets[0], prompt(0, 65), ROOT) == 0
    assert router.sent(targets[1], prompt(0, 65), ROOT) == 64


def test_what_is_known_is_bounded_and_the_oldest_goes_first() -> None:
    router, (target,) = make_router("cache_aware"), stubs(1, num_kv_blocks=8)
    first, second, third = (prompt(seed, 65) for seed in range(3))
    router.sent(target, first, ROOT)
    router.sent(target, second, ROOT)
    router.sent(target, first, ROOT)
    router.sent(target, third, ROOT)
    assert router.sent(target, first, ROOT) == 64
    assert router.sent(target, second, ROOT) == 0


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    router, (target,) = make_router("cache_aware"), stubs(1, num_kv_blocks=4)
    token_ids = prompt(0, 10 * BLOCK_SIZE)
    router.sent(target, token_ids, ROOT)
    assert router.sent(target, token_ids, ROOT) == 4 * BLOCK_SIZE


def test_a_prompt_is_hashed_once_and_not_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[int]()

    def counted(parent: bytes, keys: list[Key]) -> bytes:
        calls[len(keys)] += 1
        return hash_block(parent, keys)

    monkeypatch.setattr("nanovllm.cluster.router.hash_block", counted)
    router, targets = make_router("cache_aware"), stubs(50)
    for target in targets:
        router.sent(target, prompt(0, 20), ROOT)
    calls.clear()
    send(router, targets, prompt(0, 10 * BLOCK_SIZE + 5))
    assert calls == {BLOCK_SIZE: 10}
    send(router, targets, list(range(200_000)))
    assert calls == {BLOCK_SIZE: 10 + MAX_HASHED_BLOCKS}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.lists(st.integers(0, 2), max_size=9), st.sampled_from([b"", b"s"])
        ),
        max_size=30,
    ),
    st.integers(1, 12),
)
def test_the_match_is_that_of_a_search_from_the_start(
    requests: list[tuple[int, list[int], bytes]], num_kv_blocks: int
) -> None:
    """Bisection relies on what is known being closed under prefix; here it is looked for block by
    block in a plain model of the same cache."""
    router = CacheAwareRouter()
    targets = stubs(2, num_kv_blocks=num_kv_blocks, block_size=2)
    recent: list[list[tuple[bytes, tuple[int, ...]]]] = [[], []]  # oldest first
    for index, token_ids, root in requests:
        prefixes = [(root, tuple(token_ids[:end])) for end in range(2, len(token_ids) + 1, 2)]
        known = recent[index]
        num_matched = 0
        for prefix in prefixes:
            if prefix not in known or len(prefix[1]) >= len(token_ids):
                break
            num_matched = len(prefix[1])
        assert router.sent(targets[index], token_ids, root) == num_matched
        recent[index] = ([p for p in known if p not in prefixes] + prefixes[::-1])[-num_kv_blocks:]


@pytest.mark.parametrize("num_targets", [2, 4, 100])
def test_no_herding_when_all_share_one_prefix(num_targets: int) -> None:
    """All want the same 512 tokens; the first worker that has them must not get everything."""
    router, targets = make_router("cache_aware"), stubs(num_targets)
    system = prompt(0, 512)
    for seed in range(16 * num_targets):
        queue(router, targets, system + prompt(seed + 1, 32), output=64)
    counts = sorted(target.num_inflight for target in targets)
    assert sum(counts) == 16 * num_targets
    assert counts[-1] - counts[0] <= 8  # what the prefix is worth: 512 of 96 positions a request
    assert counts[-1] <= 1.5 * 16


def num_prefixes_computed(policy: str) -> tuple[int, Counter[int]]:
    """400 requests for 16 prefixes of 512 tokens, nine at a time, on two workers that hold ten."""
    router, targets = make_router(policy), stubs(2, num_kv_blocks=320)
    caches = CacheAwareRouter()  # what the workers really have
    draws = random.Random(0)
    prefixes = [prompt(seed, 512) for seed in range(16)]
    running: list[tuple[StubTarget, int]] = []
    num_computed, places = 0, Counter[int]()
    for request in range(400):
        token_ids = prefixes[draws.randrange(16)] + prompt(1000 + request, 20)
        target = router.pick(targets, token_ids, ROOT)
        size = len(token_ids) - router.sent(target, token_ids, ROOT) + 64
        num_computed += caches.sent(target, token_ids, ROOT) < 512
        places[target.index] += 1
        target.outstanding_tokens += size
        target.num_inflight += 1
        running.append((target, size))
        if len(running) > 8:
            target, size = running.pop(draws.randrange(len(running)))
            target.outstanding_tokens -= size
            target.num_inflight -= 1
    return num_computed, places


def test_requests_go_where_their_prefix_is_and_the_load_stays_even() -> None:
    num_computed, places = num_prefixes_computed("cache_aware")
    assert num_computed < 0.2 * num_prefixes_computed("round_robin")[0]
    assert min(places.values()) > 0.4 * 400
