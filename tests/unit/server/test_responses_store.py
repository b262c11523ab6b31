"""Responses are kept in bounded memory, those that were used last."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server import response_store
from nanovllm.server.response_store import MAX_RESPONSE_SIZE, ResponseStore


def put(store: ResponseStore, name: str, num_bytes: int) -> None:
    """Store a response of some size."""
    store.put(name, b"x" * (num_bytes - len(b"[]")), [])


def test_what_is_kept_comes_back() -> None:
    store = ResponseStore(1000)
    store.put("a", json.dumps({"output": [{"type": "message"}]}).encode(), [{"id": "1"}])
    stored = store.get("a")
    assert stored is not None
    assert stored.input_items() == [{"id": "1"}]
    assert stored.history() == [{"id": "1"}, {"type": "message"}]
    assert store.delete("a")
    assert not store.delete("a")
    assert store.get("a") is None
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(100)
    for name in "abc":
        put(store, name, 30)
    assert store.get("a")
    put(store, "d", 30)
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]


def test_what_is_too_large_pushes_nothing_out() -> None:
    store = ResponseStore(100)
    put(store, "a", 90)
    put(store, "b", 101)
    assert store.get("a")
    assert store.get("b") is None
    large = ResponseStore(1 << 30)
    put(large, "a", MAX_RESPONSE_SIZE)
    put(large, "b", MAX_RESPONSE_SIZE + 1)
    assert ("a" in large, "b" in large) == (True, False)
    nothing = ResponseStore(0)
    assert not nothing.keeps_any
    put(nothing, "a", 2)
    assert len(nothing) == 0


@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 9), st.integers(2, 60))))
def test_bounds_hold_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    store = ResponseStore(100)
    sizes: dict[str, int] = {}
    for action, number, size in steps:
        name = str(number)
        if action == "p" and name not in sizes:
            put(store, name, size)
            sizes[name] = size
        elif action == "g":
            store.get(name)
        elif action == "d":
            store.delete(name)
        sizes = {name: size for name, size in sizes.items() if name in store}
        assert store.num_bytes == sum(sizes.values()) <= 100
        assert len(store) == len(sizes)


def test_many_small_ones_are_bounded_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(response_store, "MAX_RESPONSES", 3)
    store = ResponseStore(100)
    for name in "abcd":
        put(store, name, 2)
    assert [name for name in "abcd" if store.get(name)] == ["b", "c", "d"]
