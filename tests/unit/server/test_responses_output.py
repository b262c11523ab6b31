"""The events of a response tell the same, in order, as the items that it ends up with."""

import random
import time
from collections.abc import Iterable
from typing import Any

import pytest

from nanovllm.server.chat.run import MadeCall
from nanovllm.server.responses.output import Event, Output
from nanovllm.server.responses.scores import HeldScores
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta

CALLS = [MadeCall(f"call_{index}", name) for index, name in enumerate("fgh")]


class Client:
    """Puts items together from events, and is strict about their order."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.kinds: list[str] = []
        self._done_text: str | None = None

    def read(self, events: Iterable[Event]) -> None:
        for event in events:
            kind = event["type"].removeprefix("response.")
            self.kinds.append(kind)
            getattr(self, "on_" + kind.replace(".", "_"))(event)

    @property
    def last(self) -> dict[str, Any]:
        return self.items[-1]

    def _check(self, event: Event) -> None:
        assert event["output_index"] == len(self.items) - 1
        assert event["item_id"] == self.last["id"]
        assert self.last["status"] == "in_progress"

    def on_output_item_added(self, event: Event) -> None:
        assert event["output_index"] == len(self.items)
        assert not self.items or self.last["status"] != "in_progress"
        self.items.append(dict(event["item"]))
        assert self.last["status"] == "in_progress"
        assert not self.last.get("content")
        assert not self.last.get("arguments")

    def on_content_part_added(self, event: Event) -> None:
        self._check(event)
        assert event["content_index"] == len(self.last["content"]) == 0
        self.last["content"] = [dict(event["part"])]
        assert event["part"]["text"] == ""

    def _on_delta(self, event: Event, kind: str) -> None:
        self._check(event)
        assert self.last["content"][event["content_index"]]["type"] == kind
        self.last["content"][0]["text"] += event["delta"]

    def on_output_text_delta(self, event: Event) -> None:
        self._on_delta(event, "output_text")
        self.last["content"][0]["logprobs"] += event["logprobs"]

    def on_reasoning_text_delta(self, event: Event) -> None:
        self._on_delta(event, "reasoning_text")

    def on_output_text_done(self, event: Event) -> None:
        self._check(event)
        assert event["text"] == self.last["content"][0]["text"]
        assert event["logprobs"] == self.last["content"][0]["logprobs"]

    def on_reasoning_text_done(self, event: Event) -> None:
        self._check(event)
        assert event["text"] == self.last["content"][0]["text"]

    def on_content_part_done(self, event: Event) -> None:
        self._check(event)
        assert event["part"] == self.last["content"][0]

    def on_function_call_arguments_delta(self, event: Event) -> None:
        self._check(event)
        self.last["arguments"] += event["delta"]

    def on_function_call_arguments_done(self, event: Event) -> None:
        self._check(event)
        assert event["arguments"] == self.last["arguments"]
        assert event["name"] == self.last["name"]

    def on_output_item_done(self, event: Event) -> None:
        assert event["output_index"] == len(self.items) - 1
        assert event["item"] == self.last | {"status": event["item"]["status"]}
        self.last["status"] = event["item"]["status"]
        assert self.last["status"] != "in_progress"


def run(*deltas: Delta, cut_off: bool = False) -> Client:
    output, client = Output(), Client()
    for delta in deltas:
        client.read(output.push([delta], CALLS))
    client.read(output.close(cut_off))
    assert client.items == output.items
    return client


def test_a_text() -> None:
    client = run(ContentDelta("Hel"), ContentDelta("lo"))
    assert client.kinds == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    (item,) = client.items
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == "Hello"
    assert item["id"].startswith("msg_")


def test_thoughts_a_text_and_calls() -> None:
    client = run(
        ReasoningDelta("hm"),
        ContentDelta("I look."),
        ToolCallDelta(0, "f", ""),
        ToolCallDelta(0, None, '{"a"'),
        ToolCallDelta(0, None, ": 1}"),
        ToolCallDelta(1, "g", "{}"),
    )
    thought, text, f, g = client.items
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (thought["summary"], thought["encrypted_content"]) == ([], None)
    assert text["content"][0]["text"] == "I look."
    assert (f["call_id"], f["name"], f["arguments"]) == ("call_0", "f", '{"a": 1}')
    assert (g["call_id"], g["name"], g["arguments"]) == ("call_1", "g", "{}")
    assert len({item["id"] for item in client.items}) == 4
    assert [item["id"].split("_")[0] for item in client.items] == ["rs", "msg", "fc", "fc"]


def test_text_behind_a_call_is_a_message_of_its_own() -> None:
    client = run(ContentDelta("a"), ToolCallDelta(0, "f", "{}"), ContentDelta("b"))
    assert [item["type"] for item in client.items] == ["message", "function_call", "message"]


def test_what_is_cut_off_says_so() -> None:
    client = run(ReasoningDelta("hm"), ContentDelta("I"), cut_off=True)
    assert [item["status"] for item in client.items] == ["completed", "incomplete"]
    assert run(cut_off=True).items == []


def test_a_response_without_a_word_has_an_empty_message() -> None:
    (item,) = run().items
    assert item["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]
    assert [item["type"] for item in run(ReasoningDelta("hm")).items] == ["reasoning"]


def scores(*tokens: str) -> list[Any]:
    return [{"token": token, "logprob": -1.0, "bytes": list(token.encode())} for token in tokens]


def test_tokens_that_are_of_no_text_do_not_pile_up() -> None:
    held = HeldScores()
    held.push(scores(*["<|mark|>"] * 100_000))
    held.push(scores("end"))
    started = time.process_time()
    assert [score["token"] for score in held.take("end")] == ["end"]
    assert time.process_time() - started < 0.5


def test_log_probabilities_are_those_of_the_text() -> None:
    output, client = Output(), Client()
    steps: list[tuple[list[Delta], list[str]]] = [
        ([ReasoningDelta("hm")], ["hm"]),
        ([], ["</", "think>", "\n\n"]),
        ([ContentDelta("a")], ["a", " <"]),
        ([ContentDelta(" <b")], ["b", "<tool"]),
        ([ToolCallDelta(0, "f", "{}")], ["_call>", "{}"]),
        ([ContentDelta("c\u00e9")], ["\n", "c\u00e9<"]),
        ([ContentDelta("<d")], ["d", "<|end|>"]),
    ]
    for deltas, tokens in steps:
        client.read(output.push(deltas, CALLS, scores(*tokens)))
    client.read(output.close())
    messages = [item for item in client.items if item["type"] == "message"]
    tokens_of = [
        [entry["token"] for entry in message["content"][0]["logprobs"]] for message in messages
    ]
    assert tokens_of == [["a", " <", "b"], ["c\u00e9<", "d"]]


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_deltas(seed: int) -> None:
    rng = random.Random(seed)
    deltas: list[Delta] = []
    num_calls = 0
    for _ in range(rng.randrange(20)):
        text = rng.choice(["", "a", "bc ", "\n"])
        kind = rng.randrange(3)
        if kind == 0:
            deltas.append(ReasoningDelta(text))
        elif kind == 1:
            deltas.append(ContentDelta(text))
        elif num_calls < 3:
            deltas.append(ToolCallDelta(num_calls, "fgh"[num_calls], text))
            num_calls += 1
            deltas += [ToolCallDelta(num_calls - 1, None, text)] * rng.randrange(3)
    client = run(*deltas, cut_off=rng.random() < 0.5)
    texts = {
        kind: "".join(
            part["text"]
            for item in client.items
            for part in item.get("content", ())
            if part["type"] == kind
        )
        for kind in ("output_text", "reasoning_text")
    }
    assert texts["output_text"] == "".join(d.text for d in deltas if isinstance(d, ContentDelta))
    assert texts["reasoning_text"] == "".join(
        d.text for d in deltas if isinstance(d, ReasoningDelta)
    )
    assert sum(item["type"] == "function_call" for item in client.items) == num_calls
