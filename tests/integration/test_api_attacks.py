"""Attacks through forms, tools and dialects, on a live server with the bundled model.

CVE-2025-48942, CVE-2025-48943, CVE-2025-29770, CVE-2025-32381, GHSA-rwxx-mrjm-wc2m and others:
schemas and expressions ended engines, ran for ever or filled memory. Here all of them end soon,
refused or answered, and nobody else notices.
"""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.cpu_kernels import finish_prefault
from tests.server_client import CHAT, HI, TEXT
from tests.serving import Server, asking, idle, serve

MIB = 1 << 20
ANSWER_WITHIN = 8.0
"""Seconds; five of them are how long a form may take to be made ready."""
BLOCKED_AT_MOST = 1.0
"""Seconds that the event loop may be busy; it takes a tenth of it on a machine of its own."""
MEMORY_AT_MOST = 160 * MIB

RESPONSES, MESSAGES, OLLAMA = "/v1/responses", "/v1/messages", "/api/chat"
WORDS = [f"word{number}" for number in range(10_000)]


def nested(levels: int, keyword: str) -> dict[str, Any]:
    """A schema in a schema in a schema."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema} if keyword == "items" else {keyword: {"a": schema}}
    return schema


def doubled(keyword: str) -> dict[str, Any]:
    """A billion schemas in thirty lines, as in the attack on XML with a billion laughs."""
    made: dict[str, Any] = {
        f"d{level}": {keyword: [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(30)
    }
    return {"$defs": made | {"d30": {"type": "string"}}, "$ref": "#/$defs/d0"}


def conjunction(number: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f".*{word}.*"} for word in WORDS[:number]]}


SCHEMAS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "itself in turn": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "items 10000 deep": nested(200, "items"),
    "properties 500 deep": nested(200, "properties"),
    "all of a billion": doubled("allOf"),
    "any of a billion": doubled("anyOf"),
    "one of a billion": doubled("oneOf"),
    "an enum of 10000": {"enum": WORDS},
    "an enum of 5000": {"enum": WORDS[:5000]},
    "2000 properties": {"properties": {word: {} for word in WORDS[:2000]}},
    "300 kinds of names": {"patternProperties": {f"^{word}": {} for word in WORDS[:300]}},
    "12 patterns at once": conjunction(12),
    "100 patterns at once": conjunction(100),
    "a pattern that backtracks": {"type": "string", "pattern": "^(a+)+$"},
    "a pattern that multiplies": {"type": "string", "pattern": "((.{0,100}){0,100}){0,100}"},
    "a pattern of many states": {"type": "string", "pattern": "[ab]*a[ab]{200}"},
    "a pattern of many words": {"type": "string", "pattern": f"({'|'.join(WORDS[:5000])})*"},
    "a billion characters": {"type": "string", "minLength": 10**9},
    "a billion items": {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
    "numbers near the least one": {"type": "integer", "minimum": -(2**63), "maximum": 8 - 2**63},
    "a number of 400 digits": {"type": "integer", "maximum": 10**400},
    "a number almost none": {"type": "number", "multipleOf": 1e-300},
    "a large prime": {"type": "integer", "multipleOf": 999_999_937},
    "a long constant": {"const": [0] * 10_000},
    "a file": {"$ref": "file:///etc/passwd"},
    "a page": {"$ref": "http://127.0.0.1:9/schema"},
    "leniency": {"type": "object", "x-guidance": {"lenient": True, "whitespace_pattern": "(a|a)*"}},
    "no such type": {"type": "nothing"},
    "nothing at all": {"allOf": [{"type": "string"}, {"type": "integer"}]},
}
FORMS: dict[str, Any] = {
    "regex that backtracks": {"regex": "(a+)+$" * 1000},
    "regex of words": {"regex": "|".join(WORDS[:6000])},
    "regex without end": {"regex": "a{1000000}"},
    "regex that doubles": {"regex": "(a?){500}a{500}"},
    "regex 5000 deep": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "regex that looks around": {"regex": "(?=a)b"},
    "regex of nothing": {"regex": "[^\\s\\S]"},
    "grammar of itself": {"grammar": "start: start"},
    "grammar that doubles": {
        "grammar": "start: r0\n"
        + "".join(f"r{level}: r{level + 1} r{level + 1}\n" for level in range(40))
        + 'r40: "x"'
    },
    "grammar of many rules": {
        "grammar": "start: r1\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1, 4500))
    },
    "grammar of many terminals": {
        "grammar": "start: T1\n" + "".join(f'T{i}: (T{i + 1}|"b")*\n' for i in range(1, 3000))
    },
    "grammar that repeats": {"grammar": 'start: "a"{1000000}'},
    "grammar of many patterns": {
        "grammar": "start: X\nX: " + " & ".join(f"/.*{word}.*/" for word in WORDS[:40])
    },
    "grammar that imports": {"grammar": "%import ..evil.X\nstart: X"},
    "grammar of ids": {"grammar": "start: <[4093]> <[99999999]>"},
    "grammar of GBNF": {"grammar": 'root ::= root "a" | root "b"'},
    "choice of 10000": {"choice": WORDS},
    "choice of one": {"choice": ["x" * 60_000]},
    "tag": {"structural_tag": "{"},
}
NAMES = [
    'a"b',
    "a\nb",
    "</tool_call>",
    "<|im_end|>",
    "",
    "x" * 65,
    "\u00e9",
    "a b",
    "%json {}",
    "\x00",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(dtype="float32", max_num_seqs=16, enable_lora=True) as running:
        # What is loaded once belongs to nobody's attack.
        assert ask(running, CHAT, messages=HI, max_tokens=1, **form_of({"type": "null"}))[0] == 200
        yield running


@pytest.fixture(autouse=True)
def _nobody_notices(request: pytest.FixtureRequest) -> Iterator[None]:
    """During every attack others are answered at once, and after it nothing is held."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    process = psutil.Process(server.process.pid)
    family = {process, *process.children(recursive=True)}
    for member in family:
        finish_prefault(member.pid)
    memory = sum(member.memory_info().rss for member in family)
    with asking(server) as answers:
        yield
    assert max(answers) < BLOCKED_AT_MOST, sorted(answers)[-3:]
    slow = [answer for answer in answers if answer > 0.5]
    assert len(slow) <= max(1, len(answers) // 100), slow
    assert idle(server)
    assert {process, *process.children(recursive=True)} == family
    assert sum(member.memory_info().rss for member in family) < memory + MEMORY_AT_MOST


def ask(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    return server.post(path, body)


def form_of(schema: Any) -> dict[str, Any]:
    named = {"name": "form", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def tool_of(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def ends_well(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Send what may be refused or answered, but soon, and never with a 5xx."""
    start = time.monotonic()
    status, answer = server.post(path, body)
    assert status in (200, 400), answer
    assert time.monotonic() - start < ANSWER_WITHIN
    if status == 400:
        assert "Traceback" not in str(answer)
        assert len(str(answer)) < 2000
    return status, answer


class TestForms:
    @pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
    def test_schemas(self, server: Server, schema: Any) -> None:
        body: dict[str, Any] = {"messages": HI, "max_tokens": 4}
        ends_well(server, CHAT, body | form_of(schema))

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_other_forms(self, server: Server, form: Any) -> None:
        body = {"prompt": "Once", "max_tokens": 4, "structured_outputs": form}
        ends_well(server, TEXT, body)

    @pytest.mark.parametrize(
        "name", ["itself", "an enum of 5000", "100 patterns at once", "a billion items"]
    )
    def test_schemas_of_other_dialects(self, server: Server, name: str) -> None:
        schema = {"type": "object", "properties": {"x": SCHEMAS[name]}, "required": ["x"]}
        form = {"type": "json_schema", "name": "form", "schema": schema}
        ends_well(
            server, RESPONSES, {"input": "Hi", "max_output_tokens": 16, "text": {"format": form}}
        )
        tool = {"name": "x", "input_schema": schema}
        body = {"model": "demo_model", "messages": HI, "max_tokens": 4}
        ends_well(server, MESSAGES, body | {"tools": [tool], "tool_choice": {"type": "any"}})
        body = {"model": "demo_model", "messages": HI, "format": schema, "stream": False}
        ends_well(server, OLLAMA, body | {"options": {"num_predict": 4}})

    def test_a_thousand_of_them(self, server: Server) -> None:
        """Each another one: what is kept of them has a bound."""

        def send(number: int) -> int:
            schema = {"type": "object", "properties": {f"p{number}": {"enum": WORDS[:50]}}}
            body = {"messages": HI, "max_tokens": 2, **form_of(schema)}
            status, answer = server.post(CHAT, body)
            assert status in (200, 503), answer
            return status

        with ThreadPoolExecutor(16) as threads:
            statuses = list(threads.map(send, range(1000)))
        assert statuses.count(200) > 900

    def test_clients_that_leave_while_theirs_is_made_ready(self, server: Server) -> None:
        schema = {"properties": {word: {"type": "string"} for word in WORDS[:1500]}}
        for number in range(8):
            schema["properties"][f"own{number}"] = {"type": "null"}
            body = json.dumps({"messages": HI, "max_tokens": 500, **form_of(schema)}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.1 * number)
        assert idle(server)
        assert ask(server, TEXT, prompt="Once", max_tokens=2)[0] == 200


class TestTools:
    @pytest.mark.parametrize("name", NAMES, ids=repr)
    def test_names(self, server: Server, name: str) -> None:
        body = {"messages": HI, "max_tokens": 2, "tools": [tool_of(name)]}
        assert ends_well(server, CHAT, body)[0] == 400

    @pytest.mark.parametrize("choice", ["auto", "required", "none"])
    def test_128_large_ones(self, server: Server, choice: str) -> None:
        pattern = {"type": "string", "description": "y" * 50, "pattern": "[a-z]{1,40}"}
        schema = {"type": "object", "properties": dict.fromkeys(WORDS[:30], pattern)}
        tools = [tool_of(f"tool{number}", schema) for number in range(128)]
        ends_well(
            server, CHAT, {"messages": HI, "max_tokens": 4, "tools": tools, "tool_choice": choice}
        )

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_schemas(self, server: Server, name: str) -> None:
        schema = {"type": "object", "properties": {"x": SCHEMAS[name]}, "required": ["x"]}
        body = {"messages": HI, "max_tokens": 4, "tools": [tool_of("x", schema)]}
        ends_well(server, CHAT, body | {"tool_choice": "required"})

    @pytest.mark.parametrize(
        "text",
        [
            '<tool_call>{"name": "x", "arguments": {"a": [' * 20_000,
            "<think>" * 100_000,
            "[" * 1_000_000,
            "[TOOL_CALLS]" * 60_000,
        ],
        ids=lambda text: text[:12],
    )
    def test_a_megabyte_that_looks_like_calls(self, server: Server, text: str) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "x", "arguments": text}}
        for message in (
            {"role": "assistant", "content": text},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": text},
        ):
            body = {"messages": [*HI, message], "tools": [tool_of("x")], "max_tokens": 2}
            assert ends_well(server, CHAT, body)[0] == 400


@pytest.mark.slow
def test_an_engine_that_is_killed_meanwhile() -> None:
    """Requests with forms that are answered, wait, or are being made ready end with a 5xx."""
    with serve(dtype="float32", max_num_seqs=2) as server:
        (worker,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "nanovllm.worker" in " ".join(child.cmdline())
        )
        schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 3000}}}

        def send(number: int) -> int:
            form = form_of(schema | {"required": ["a"], "title": str(number)})
            return server.post(CHAT, {"messages": HI, "max_tokens": 3000, **form})[0]

        with ThreadPoolExecutor(8) as threads:
            sent = [threads.submit(send, number) for number in range(8)]
            time.sleep(1.0)
            worker.kill()
            statuses = {each.result() for each in sent}
        assert statuses <= {500, 503}, statuses
        server.wait_until_ready()
        small = form_of({"enum": ["a", "b"]})
        status, answer = ask(server, CHAT, messages=HI, **small)
        assert status == 200
        assert answer["choices"][0]["message"]["content"] in ('"a"', '"b"')
