"""Attacks that other inference servers have fallen to, on a live server with the bundled model.

The names of the tests have the lesson, their comments the advisory it was learnt from.
"""

import ast
import json
import random
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import nanovllm
from tests.cpu_kernels import finish_prefault
from tests.serving import Server, asking

KEY = "sk-test"
TIMEOUT = 1.0
HUGE = 10**9
MIB = 1 << 20

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PART = {"type": "text", "text": ""}
HEAD = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
JSON_HEAD = HEAD + "Content-Type: application/json\r\n"

SOURCES = sorted(Path(nanovllm.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options: dict[str, Any] = {
        "request_timeout": TIMEOUT,
        "keep_alive_timeout": 0.3,
        "max_num_seqs": 4,
    }
    with Server(api_key=[KEY], **options) as server:
        yield server


@pytest.fixture(autouse=True)
def _still_serves(server: Server) -> Iterator[None]:
    """After every attack: the same process, no larger, answers, and holds nothing for anybody."""
    process = psutil.Process(server.process.pid)
    family = {process, *process.children(recursive=True)}
    for member in family:
        finish_prefault(member.pid)
    memory = sum(member.memory_info().rss for member in family)
    yield
    assert post(server, TEXT, prompt="Once", max_tokens=2)[0] == 200
    assert {process, *process.children(recursive=True)} == family
    assert sum(member.memory_info().rss for member in family) < memory + 64 * MIB
    for _ in range(100):
        pool = server.get("/metrics.json", Authorization=f"Bearer {KEY}")[1]
        if not pool["inflight_total"] and not pool["kv_cache_usage"]:
            return
        time.sleep(0.05)
    raise AssertionError(pool)


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    return server.post(path, body, Authorization=f"Bearer {KEY}")


def refused(server: Server, path: str, **body: Any) -> dict[str, Any]:
    """Send a request that must be refused, at once and in the one shape; return the error."""
    start = time.monotonic()
    status, answer = post(server, path, **body)
    assert status == 400, (body, answer)
    assert time.monotonic() - start < 1.0
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "0x" not in error["message"]
    assert str(Path(nanovllm.__file__).parent) not in error["message"]
    return error


def send_raw(server: Server, *parts: bytes, pause: float = 0.0, wait: float = 10.0) -> bytes:
    """Send bytes and return what comes back until the server hangs up or is silent."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as sock:
        try:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause)
            while chunk := sock.recv(65536):
                answer += chunk
        except (TimeoutError, ConnectionError):
            pass
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class TestValues:
    @pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""], [["a"]], None, {}, 1])
    def test_empty_prompts(self, server: Server, prompt: Any) -> None:
        """CVE-2024-8768: an empty prompt ended the server."""
        refused(server, TEXT, prompt=prompt)

    @pytest.mark.parametrize("messages", [[], None, {}, "hi", [{}], [{"role": "x"}], [[]]])
    def test_empty_conversations(self, server: Server, messages: Any) -> None:
        refused(server, CHAT, messages=messages)

    @pytest.mark.parametrize("field", ["n", "best_of", "logprobs", "max_tokens", "prompt_logprobs"])
    def test_multipliers_have_bounds(self, server: Server, field: str) -> None:
        """CVE-2024-8939, CVE-2026-34756: work and memory were multiplied before any queue."""
        error = refused(server, TEXT, prompt="Once", **{field: HUGE})
        assert error["param"] == field

    def test_so_have_lists(self, server: Server) -> None:
        refused(server, TEXT, prompt=["a"] * 1000)
        refused(server, TEXT, prompt="a", stop=["b"] * 100)
        refused(server, TEXT, prompt="a", stop=["b" * 1000])
        refused(server, TEXT, prompt=["a"] * 100, n=100)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("n", -1), ("n", 0), ("n", True), ("n", 1.5), ("n", "1"), ("max_tokens", -1)),
            *(("top_k", -7), ("min_tokens", -1), ("logprobs", -1), ("truncate_prompt_tokens", -9)),
            *(("prompt", [-1]), ("prompt", [HUGE]), ("stop_token_ids", [-1])),
            *(("stop_token_ids", [HUGE]), ("allowed_token_ids", [-1]), ("allowed_token_ids", [])),
            *(("logit_bias", {"-1": 1}), ("logit_bias", {str(HUGE): 1}), ("logit_bias", {"a": 1})),
            *(("logit_bias", {"1": 1e6}), ("logit_bias", {"1": "x"}), ("bad_words", [""])),
            *(("seed", "x"), ("seed", 1.5), ("stop", [""]), ("priority", "high"), ("echo", 2)),
        ],
    )
    def test_numbers_have_bounds_below_and_types(
        self, server: Server, field: str, value: Any
    ) -> None:
        """CVE-2026-21869 of llama.cpp: a negative count wrote before the buffer."""
        refused(server, TEXT, **{"prompt": "Once", field: value})

    @pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1"])
    def test_no_number_is_none(self, server: Server, field: str, value: str) -> None:
        """GHSA-7h4p-rffg-7823: NaN and infinities reached the kernels."""
        body = f'{{"prompt": "Once", "max_tokens": 1, "{field}": {value}}}'.encode()
        headers = {"Authorization": f"Bearer {KEY}"}
        assert server.request("POST", TEXT, body, headers)[0] == 400

    def test_every_parameter_at_once(self, server: Server) -> None:
        """CVE-2026-44223: one penalty together with one mode ended the engine."""
        status, answer = post(
            server,
            TEXT,
            prompt=["Once upon", "There was"],
            n=2,
            max_tokens=8,
            temperature=0.7,
            top_p=0.9,
            top_k=20,
            min_p=0.01,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            seed=1,
            frequency_penalty=0.5,
            logit_bias={"5": -100},
            min_tokens=4,
            logprobs=5,
            bad_words=["bad"],
            stop=["zzz"],
            stop_token_ids=[1],
            echo=True,
        )
        assert status == 200, answer
        assert len(answer["choices"]) == 4

    @pytest.mark.parametrize(
        ("path", "field", "value"),
        [
            (TEXT, "prompt_embeds", "AAAA"),  # CVE-2025-62164: a tensor of the request's was read
            (TEXT, "logits_processors", ["os.system"]),  # CVE-2026-7304: code of the request's ran
            (CHAT, "chat_template", "{{ ''.__class__ }}"),  # CVE-2025-61620, CVE-2026-5760
            (CHAT, "chat_template_kwargs", {"tokenize": True}),  # CVE-2025-62426
            (CHAT, "chat_template_kwargs", {"chat_template": "x"}),
            (CHAT, "chat_template_kwargs", {"messages": []}),
            # CVE-2025-48942 and others: schemas and expressions ended the engine, or ran for ever.
            (CHAT, "response_format", {"type": "json_schema", "json_schema": {"$ref": "#"}}),
            (TEXT, "structured_outputs", {"regex": "(a+)+$" * 1000}),
            (TEXT, "guided_regex", "["),
            (TEXT, "guided_json", {"type": "something"}),
            (TEXT, "guided_grammar", "root ::= root"),
        ],
    )
    def test_what_a_request_may_not_bring(
        self, server: Server, path: str, field: str, value: Any
    ) -> None:
        what = {"prompt": "Once"} if path == TEXT else {"messages": HI}
        error = refused(server, path, **what, **{field: value})
        assert field in str(error["param"]) + error["message"]

    @pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
    def test_nothing_is_fetched_for_a_request(self, server: Server, kind: str) -> None:
        """CVE-2025-6242, CVE-2026-33626 and others: the server opened a client's URL."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
            part = {"type": kind, kind: {"url": url, "data": url, "file_data": url}}
            text = {"type": "text", "text": f"![x]({url})"}
            refused(server, CHAT, messages=[{"role": "user", "content": [text, part]}])
            post(server, CHAT, messages=[{"role": "user", "content": [text]}], max_tokens=1)
            listener.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listener.accept()

    def test_a_prompt_that_is_far_too_long(self, server: Server) -> None:
        """GHSA-rwxx-mrjm-wc2m and others: a long text kept the event loop busy."""
        with asking(server) as answers:
            for text in ("a" * MIB, "<|im_start|>" * 100_000, "\u0301" * 500_000, " " * MIB):
                status, answer = post(server, TEXT, prompt=text, max_tokens=1)
                assert status == 400
                assert "maximum context length" in answer["error"]["message"]
        assert max(answers) < 2.0, answers  # two cores for the client, the server and the tests

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT, {"messages": [{}] * 1_000_000}),
            (CHAT, {"messages": [{"role": "user"}] * 200_000}),
            (CHAT, {"messages": [{"role": "user", "content": [{}] * 1_000_000}]}),
            (CHAT, {"messages": [{"role": "user", "content": [PART] * 30}] * 4000}),
            (CHAT, {"messages": HI, "documents": [{}] * 1_000_000}),
            (CHAT, {"messages": HI, "documents": [{str(i): 1 for i in range(300_000)}]}),
            (CHAT, {"messages": HI, "tools": [{}] * 1_000_000}),
            (TEXT, {"prompt": ["a"] * 690_000}),
            (TEXT, {"prompt": [[1]] * 690_000}),
            (TEXT, {"prompt": [[]] * 690_000}),
            (TEXT, {"prompt": [1] * 1_300_000}),
            (TEXT, {"prompt": [1.0] * 800_000}),
            (TEXT, {"prompt": [1] * 1_000_000 + ["x"]}),
            (TEXT, {"prompt": "a", "stop": ["b"] * 690_000}),
            (TEXT, {"prompt": "a", "stop_token_ids": ["x"] * 690_000}),
            (TEXT, {"prompt": "a", "bad_words": [1] * 1_000_000}),
            (TEXT, {"prompt": "a", "logit_bias": {f"a{i}": 1 for i in range(250_000)}}),
            ("/detokenize", {"tokens": ["x"] * 690_000}),
            ("/detokenize", {"tokens": [1] * 1_300_000}),
            ("/tokenize", {"messages": [{}] * 1_000_000}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
    )
    def test_a_body_of_a_million_parts(
        self, server: Server, path: str, body: dict[str, Any]
    ) -> None:
        """An error for each wrong item, and they were all told apart: 13 s for 3 MB."""
        data = json.dumps(body, separators=(",", ":")).encode()
        assert len(data) < 4 * MIB
        with asking(server) as answers:
            start = time.monotonic()
            headers = {"Authorization": f"Bearer {KEY}"}
            assert server.request("POST", path, data, headers)[0] == 400
            assert time.monotonic() - start < 4  # on a slow machine 1.5
        assert max(answers) < 1.0, answers  # two cores for the client, the server and the tests

    def test_salts_do_not_share(self, server: Server) -> None:
        """CVE-2025-46570: the time of an answer told what others had asked."""
        prompt = "The dragon slept on its gold for a hundred years. " * 8

        def cached(salt: str | None) -> int:
            body = {"prompt": prompt, "max_tokens": 1}
            usage = post(server, TEXT, **body, **({"cache_salt": salt} if salt else {}))[1]["usage"]
            number: int = usage["prompt_tokens_details"]["cached_tokens"]
            return number

        assert cached("alice") == 0
        assert cached("alice") > 0
        assert cached("bob") == cached(None) == 0


class TestAccess:
    def test_every_path_that_is_documented_needs_a_key(self, server: Server) -> None:
        """vLLM's documentation: its key covers /v1 only, and other routes were open."""
        description = server.get("/openapi.json", Authorization=f"Bearer {KEY}")[1]
        assert len(description["paths"]) > 10
        for path, operations in description["paths"].items():
            for method in operations:
                status, _ = server.request(method.upper(), path, {})
                assert (status == 401) == (path not in ("/health", "/ready")), path

    @pytest.mark.parametrize("host", ["x/health?", "x/health#", "x/health", "a:b:c", "", "\t", "["])
    def test_a_host_opens_nothing(self, server: Server, host: str) -> None:
        """CVE-2026-48746, CVE-2026-48710: the path was taken from a URL made with the host."""
        request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert status_of(send_raw(server, request.encode())) in (400, 401)

    @pytest.mark.parametrize(
        "target",
        [
            *("http://x/v1/models", "//x/v1/models", "/health/../v1/models", "/health;/v1/models"),
            *("/v1/models?/health", "/%2e%2e/v1/models", "/v1%2fmodels", "/playground/../v1"),
            *("/health%00/v1/models", "/health/", "/v1/models#/health", "/playground/%2e%2e/x"),
        ],
    )
    def test_nor_does_a_path(self, server: Server, target: str) -> None:
        request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert status_of(send_raw(server, request.encode())) in (400, 401, 404)

    @pytest.mark.parametrize(
        "path",
        [
            *("/pause", "/sleep", "/collective_rpc", "/invocations"),
            *("/api/pull", "/api/create", "/reset_prefix_cache", "/start_profile", "/flush_cache"),
        ],
    )
    def test_there_is_no_door_for_operators(self, server: Server, path: str) -> None:
        """CVE-2026-7020 and others: what loads or runs something was open to all."""
        assert post(server, path)[0] == 404
        assert server.post(path, {})[0] == 401

    @pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
    def test_adapters_are_for_who_has_the_admin_key(self, server: Server, path: str) -> None:
        assert post(server, path)[0] == 401

    def test_it_listens_on_the_loopback_and_in_a_private_directory(self, server: Server) -> None:
        """CVE-2024-50050, CVE-2025-30165, CVE-2025-47277: internal sockets were open to all."""
        process = psutil.Process(server.process.pid)
        for member in (process, *process.children(recursive=True)):
            for connection in member.net_connections("inet"):
                assert connection.laddr[0] == "127.0.0.1"
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr[1] == server.port
            for connection in member.net_connections("unix"):
                path = Path(str(connection.laddr))
                if path.is_socket() and "nanovllm" in str(path):
                    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_bytes_for_the_workers_socket_do_no_harm(self, server: Server) -> None:
        """vLLM issue 44486: a port scanner's bytes ended the engine."""
        made = random.Random(0)
        for path in Path(tempfile.gettempdir()).glob("nanovllm-*/*"):
            for _ in range(5):
                with socket.socket(socket.AF_UNIX) as sock:
                    try:
                        sock.connect(str(path))
                        sock.sendall(made.randbytes(1000))
                    except OSError:
                        continue


class TestConnections:
    """Bytes that are no requests, or never become one."""

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\x00" * 100,
            b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200,
            HEAD.encode() + b"Content-Length: -1\r\n\r\n",
            HEAD.encode() + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            HEAD.encode() + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
            HEAD.encode() + b"Content-Length: 0x10\r\n\r\n",
            HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            HEAD.encode() + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
            HEAD.encode() + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
            b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET /health HTTP/1.1\r\n\r\n",
            b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        ],
        ids=lambda data: repr(data[-40:]),
    )
    def test_malformed(self, server: Server, request_bytes: bytes) -> None:
        answer = send_raw(server, request_bytes, wait=TIMEOUT + 3)
        assert status_of(answer) in (400, 401, 408, 413, 501)
        assert b'{"error": {"message": ' in answer

    def test_truncated_bodies(self, server: Server) -> None:
        body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
        for length in range(len(body)):
            head = f"{JSON_HEAD}Connection: close\r\nContent-Length: {length}\r\n\r\n".encode()
            assert status_of(send_raw(server, head, body[:length])) == 400

    def test_a_length_that_is_too_long_or_too_short(self, server: Server) -> None:
        body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
        head = f"{JSON_HEAD}Content-Length: {len(body) + 1}\r\n\r\n".encode()
        assert status_of(send_raw(server, head, body, wait=TIMEOUT + 3)) == 408
        head = f"{JSON_HEAD}Content-Length: {len(body) - 1}\r\n\r\n".encode()
        assert status_of(send_raw(server, head, body)) == 400

    @pytest.mark.parametrize(
        "body",
        [
            b'{"prompt": "\xff\xfe", "max_tokens": 1}',
            b'{"prompt": "\\ud800", "max_tokens": 1}',
            b'{"prompt": "\xed\xa0\x80", "max_tokens": 1}',
            b"[" * 500_000,
            b'{"prompt":' * 100_000,
            b'{"prompt": "x", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"max_tokens": ' + b"9" * 100_000 + b', "prompt": "x"}',
            b'{"prompt": ' + b"9" * 100_000 + b"}",
            b'"' + b"\\u0000" * 1000 + b'"',
            b"\xef\xbb\xbf{}",
            "{}".encode("utf-16"),
        ],
        ids=lambda data: repr(data[:24]),
    )
    def test_bodies_that_are_no_requests(self, server: Server, body: bytes) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        status, answer = server.request("POST", TEXT, body, headers)
        assert status == 400
        assert answer["error"]["message"]

    def test_the_last_of_two_values_counts(self, server: Server) -> None:
        body = b'{"prompt": "Once", "max_tokens": 5, "max_tokens": 1}'
        status, answer = server.request("POST", TEXT, body, {"Authorization": f"Bearer {KEY}"})
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 1

    def test_a_header_without_end(self, server: Server) -> None:
        """CVE-2025-48956: one header could be as long as memory."""
        answer = send_raw(
            server, b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", *[b"y" * MIB] * 50, b"\r\n\r\n"
        )
        assert answer == b"" or status_of(answer) == 431  # it may hang up before we have read

    def test_headers_without_end(self, server: Server) -> None:
        lines = [b"X-%d: y\r\n" % number * 1000 for number in range(200)]
        answer = send_raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n", *lines, b"\r\n")
        assert answer == b"" or status_of(answer) == 431

    def test_headers_just_too_large_or_too_many(self, server: Server) -> None:
        large = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 66_000 + b"\r\n\r\n"
        assert status_of(send_raw(server, large)) == 431
        many = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 300 + b"\r\n"
        assert status_of(send_raw(server, many)) == 431

    def test_a_body_of_50_mb(self, server: Server) -> None:
        chunk = b"x" * MIB
        head = f"{JSON_HEAD}Content-Length: {50 * MIB}\r\n\r\n".encode()
        assert status_of(send_raw(server, head, *[chunk] * 50)) == 413
        head = f"{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
        chunks = [b"%x\r\n%b\r\n" % (MIB, chunk)] * 50
        assert status_of(send_raw(server, head, *chunks, b"0\r\n\r\n")) == 413

    def test_many_large_bodies_that_never_end(self) -> None:
        """Each by itself may be so large; all together they were held in memory: 240 MiB."""
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {4 * MIB}\r\n\r\n".encode()
        with Server(request_timeout=5) as server:
            process = psutil.Process(server.process.pid)
            memory = process.memory_info().rss
            for _ in range(3):
                address = ("127.0.0.1", server.port)
                connections = [socket.create_connection(address) for _ in range(50)]
                for connection in connections:
                    with suppress(ConnectionError):
                        connection.sendall(head + b" " * (4 * MIB - 1))
                grown = process.memory_info().rss - memory
                assert server.post(TEXT, {"prompt": "Once", "max_tokens": 1})[0] == 200
                for connection in connections:
                    connection.close()
                assert grown < 128 * MIB  # the allocator keeps some of it, but no more each time

    def test_a_body_that_is_only_promised(self, server: Server) -> None:
        head = f"{JSON_HEAD}Expect: 100-continue\r\nContent-Length: {HUGE}\r\n\r\n".encode()
        answer = send_raw(server, head)
        assert status_of(answer) == 413
        assert b" 100 " not in answer

    @pytest.mark.parametrize("where", ["nothing", "head", "body"])
    def test_slow_loris(self, server: Server, where: str) -> None:
        """uvicorn waits for ever for the rest of a request."""
        start = time.monotonic()
        drops = {
            "nothing": [],
            "head": [JSON_HEAD.encode(), *(b"X-%d: y\r\n" % i for i in range(100))],
            "body": [f"{JSON_HEAD}Content-Length: 1000\r\n\r\n".encode(), *[b"x"] * 100],
        }[where]
        answer = send_raw(server, *drops, pause=0.1, wait=TIMEOUT + 5)
        assert time.monotonic() - start < TIMEOUT + 3
        assert answer == b"" or status_of(answer) == 408

    def test_many_of_them_keep_nobody_out(self, server: Server) -> None:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
        try:
            for connection in connections:
                connection.sendall(HEAD.encode())
            assert post(server, TEXT, prompt="Once", max_tokens=1)[0] == 200
            time.sleep(TIMEOUT + 1)
            for connection in connections:
                connection.settimeout(2)
                assert status_of(connection.recv(1000)) == 408
        finally:
            for connection in connections:
                connection.close()

    def test_pipelining(self, server: Server) -> None:
        body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
        request = f"{JSON_HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        last = request.replace(b"Host: x", b"Host: x\r\nConnection: close")
        answer = send_raw(server, request * 20 + last)
        assert answer.count(b"HTTP/1.1 200 OK") == 21
        answer = send_raw(server, request * 5 + b"\x00garbage\r\n\r\n" * 100)
        assert answer.count(b"HTTP/1.1 200 OK") == 5
        assert b"HTTP/1.1 400" in answer

    def test_two_lengths(self, server: Server) -> None:
        """Request smuggling: where it ends depends on who reads it."""
        head = f"{JSON_HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = send_raw(server, head.encode() + b"2\r\n{}\r\n0\r\n\r\n" * 2)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert status_of(answer) == 400
        assert b"connection: close" in answer.lower()

    def test_clients_that_hang_up_anywhere(self, server: Server) -> None:
        body = json.dumps({"prompt": "Once", "max_tokens": 500, "stream": True}).encode()
        request = f"{JSON_HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        made = random.Random(0)
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(request[: made.randrange(1, len(request) + 1)])
                time.sleep(made.choice((0, 0.01)))

    def test_random_bytes(self, server: Server) -> None:
        made = random.Random(0)
        seed = f"{JSON_HEAD}Content-Length: 30\r\n\r\n".encode() + b'{"prompt": "Once", "n": 1}    '
        for _ in range(60):
            data = bytearray(seed)
            for _ in range(made.randrange(1, 20)):
                data[made.randrange(len(data))] = made.randrange(256)
            send_raw(server, bytes(data), made.randbytes(made.randrange(200)), wait=0.05)

    def test_other_methods_and_upgrades(self, server: Server) -> None:
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "FOO", "OPTIONS"):
            request = f"{HEAD}Connection: close\r\n\r\n".replace("POST", method, 1)
            answer = send_raw(server, request.encode())
            assert status_of(answer) == 405
            assert b"allow: POST" in answer
        request = f"{HEAD}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n".replace("POST", "GET")
        assert status_of(send_raw(server, request.encode(), wait=1)) == 405


# CVE-2024-50050, CVE-2025-10164 and others: pickle over a socket runs what it is sent.
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# CVE-2025-9141: eval() of a tool call's arguments. CVE-2025-24357: torch.load runs what it
# reads. CVE-2025-66448: so does a model with code of its own.
CALLS = {"eval", "exec", "__import__", "torch.load"}
METHODS = {"recv_pyobj", "send_pyobj"}


class TestSource:
    """What no file of ours may do."""

    def test_it_unpickles_and_evaluates_nothing(self) -> None:
        found = []
        for path in SOURCES:
            for node in ast.walk(ast.parse(path.read_text())):
                if used := self.used(node) & (PICKLES | CALLS | METHODS):
                    found.append(f"{path.name}:{node.lineno}: {used}")  # type: ignore[attr-defined]
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.literal_eval(node.value) is False, path
        assert not found

    def used(self, node: ast.AST) -> set[str]:
        """What a piece of code imports or calls."""
        if isinstance(node, ast.Import):
            return {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            if [alias.name for alias in node.names] == ["UnpicklingError"]:
                return set()  # which torch raises for us
            return {(node.module or "").split(".")[0]}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)  # `model.eval` is torch's, and no harm
            if called == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords):
                return set()  # tensors and nothing else
            return {called, called.split(".")[-1]} if called.endswith("pyobj") else {called}
        return set()
