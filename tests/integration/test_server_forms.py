"""Forms and calls on a live server: what the bundled model must write, and what it is not asked."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.server_client import CHAT, HI, TEXT, events_of
from tests.serving import Server, serve

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Oslo"]},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED: dict[str, Any] = {"messages": HI, "max_tokens": 300, "temperature": 1.2, "seed": 1}
DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"items": DEEP}
ATTACKS: list[dict[str, Any]] = [
    {"json": {"$ref": "#"}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"json": DEEP},
    {"json": {"type": "string", "pattern": "(((a{1,99}){1,99}){1,99}){1,99}"}},
    {"json": {"type": "string", "minLength": 10**9}},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "null"}}},
    {"json": {"enum": ["x" * 70_000]}},
    {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    {"json": "{"},
    {"json": {"type": "nothing"}},
    {"regex": "(a|b)*a" + "(a|b)" * 40},
    {"regex": "(?=a)b"},
    {"regex": "["},
    {"grammar": "start: start"},
    {"grammar": "start: a\na: b\nb: a"},
    {"grammar": 'root ::= root "a" | root "b"'},
    {"grammar": "(" * 5000},
    {"choice": ["a" * 256] * 1024},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(dtype="float32") as running:
        yield running


def calls_of(server: Server, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The reason why a message ends, and the names and arguments of its calls."""
    if not body.get("stream"):
        status, answer = server.post(CHAT, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        functions = [call["function"] for call in choice["message"].get("tool_calls", [])]
        return choice["finish_reason"], [(f["name"], f["arguments"]) for f in functions]
    status, answer = server.post(CHAT, body)
    assert status == 200, answer
    names: list[str] = []
    arguments: list[str] = []
    choices = [chunk["choices"][0] for chunk in events_of(answer)]
    for choice in choices:
        for part in choice["delta"].get("tool_calls", []):
            if "name" in part["function"]:
                names.append(part["function"]["name"])
                arguments.append("")
            arguments[part["index"]] += part["function"]["arguments"]
    return choices[-1]["finish_reason"], list(zip(names, arguments, strict=True))


class TestCalls:
    @pytest.mark.parametrize(
        "parser",
        [
            "hermes",
            *(
                pytest.param(name, marks=pytest.mark.slow)
                for name in ("llama3_json", "mistral", "pythonic")
            ),
        ],
    )
    def test_required_calls_are_called_as_described(self, parser: str) -> None:
        validator = Draft202012Validator(PARAMETERS)
        with serve(dtype="float32", tool_call_parser=parser) as server:
            body = ASKED | {"tools": [WEATHER, CLOCK], "tool_choice": "required"}
            for more in ({}, {"stream": True}, {"parallel_tool_calls": False, "temperature": 0}):
                reason, calls = calls_of(server, body | more)
                assert reason in ("tool_calls", "length")
                assert calls
                whole = calls if reason == "tool_calls" else calls[:-1]
                for name, arguments in whole:
                    assert name in ("weather", "clock")
                    if name == "weather":
                        validator.validate(json.loads(arguments))
                assert reason == "tool_calls" or "parallel_tool_calls" not in more

    def test_the_named_one_is_called_once(self, server: Server) -> None:
        named = {"type": "function", "function": {"name": "weather"}}
        body = ASKED | {"tools": [WEATHER, CLOCK], "tool_choice": named}
        for streams in (False, True):
            reason, calls = calls_of(server, body | {"stream": streams})
            assert reason == "tool_calls"
            ((name, arguments),) = calls
            assert name == "weather"
            Draft202012Validator(PARAMETERS).validate(json.loads(arguments))

    def test_streams_say_what_whole_answers_say(self, server: Server) -> None:
        body = ASKED | {"tools": [WEATHER], "tool_choice": "required"}
        assert calls_of(server, body) == calls_of(server, body | {"stream": True})


class TestForms:
    def test_after_thoughts(self) -> None:
        """Thoughts have no form; what follows them has."""
        choice = {"structured_outputs": {"choice": ["yes", "no"]}}
        with serve(dtype="float32", reasoning_parser="qwen3") as server:
            for seed in range(4):
                body = ASKED | choice | {"seed": seed, "max_tokens": 200}
                status, answer = server.post(CHAT, body)
                assert status == 200, answer
                (said,) = answer["choices"]
                if said["finish_reason"] == "stop":
                    assert said["message"]["content"] in ("yes", "no")
                else:
                    assert said["message"]["reasoning_content"]
            status, answer = server.post(CHAT, ASKED | choice | {"reasoning_effort": "none"})
            assert status == 200
            assert answer["choices"][0]["message"]["content"] in ("yes", "no")
            assert "reasoning_content" not in answer["choices"][0]["message"]

    def test_a_wrong_parser_ends_the_start(self) -> None:
        server = Server(tool_call_parser="morse", wait=False)
        try:
            assert server.process.wait(60) != 0
        finally:
            server.stop()
        assert "tool_call_parser" in server.log
        assert "hermes" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("form", ATTACKS, ids=lambda form: json.dumps(form)[:40])
def test_attacks(server: Server, form: dict[str, Any]) -> None:
    """A refusal, or an answer; the server has time for others all the while."""
    slowest = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal slowest
        while not done.is_set():
            start = time.monotonic()
            assert server.get("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    try:
        requests: list[tuple[str, dict[str, Any]]] = [
            (TEXT, {"prompt": "Once", "structured_outputs": form}),
        ]
        if isinstance(form.get("json"), dict):
            tool = {"name": "f", "parameters": form["json"], "strict": True}
            tools = [{"type": "function", "function": tool}]
            requests += [
                (CHAT, {"messages": HI, "tools": tools, "tool_choice": choice})
                for choice in ("required", "auto")
            ]
        for path, body in requests:
            status, answer = server.post(path, body | {"max_tokens": 4})
            assert status in (200, 400), answer
            if status == 400:
                assert answer["error"]["param"] in ("structured_outputs", "tools", "messages")
                assert len(answer["error"]["message"]) > 20
    finally:
        done.set()
        watcher.join()
    assert time.monotonic() - start < 30
    assert slowest < 2
    assert server.post(TEXT, {"prompt": "Once", "max_tokens": 2})[0] == 200
