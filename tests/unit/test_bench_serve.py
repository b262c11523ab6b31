"""The load test, against a server that does exactly what a script says."""

import asyncio
import json
import math
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanovllm.bench.http import HTTPClient, ProtocolError
from nanovllm.bench.load import ClientLoad, Record, Target, run_load, send_times
from nanovllm.bench.plot import plot_loads
from nanovllm.bench.serve import ServeResult, run, run_serve
from nanovllm.bench.serve_config import Load, ServeConfig, parse_slo
from nanovllm.bench.stats import Distribution, LoadResult, summarize
from nanovllm.bench.workload import first
from nanovllm.cli import main
from nanovllm.errors import InvalidRequestError


@dataclass
class Script:
    """How the server behaves.

    Args:
        first_token: Seconds to the first token.
        gap: Seconds between events.
        tokens_per_event: Tokens in each of them.
        fault: What goes wrong, if anything, with requests whose `max_tokens` is `faulty`.
        faulty: See `fault`; None is all.
        has_version: Whether there is a `/version`, as ours and vLLM's have.
    """

    first_token: float = 0.0
    gap: float = 0.0
    tokens_per_event: int = 1
    fault: str | None = None
    faulty: int | None = None
    has_version: bool = True
    url: str = ""
    num_connections: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self.num_connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                fields = dict(line.split(": ", 1) for line in head.splitlines()[1:-1])
                self.keys.append(fields.get("Authorization", ""))
                body = await reader.readexactly(int(fields["Content-Length"]))
                await self._answer(head.split()[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/version" and self.has_version:
            return _send(writer, 200, {"version": "1.2.3"})
        if path == "/v1/models":
            return _send(writer, 200, {"data": [{"id": "tale"}]})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return _send(writer, 404, {"detail": "Not Found"})
        request = json.loads(body)
        self.asked.append(request)
        fault = self.fault if self.faulty in (None, request["max_tokens"]) else None
        if fault == "503":
            return _send(writer, 503, {"error": {"message": "full"}})
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self._stream(request, path.startswith("/v1/chat"), fault, writer)
        return None

    async def _stream(
        self,
        request: dict[str, Any],
        is_chat: bool,
        fault: str | None,
        writer: asyncio.StreamWriter,
    ) -> None:
        num_tokens = request["max_tokens"]

        def event(text: str, finish_reason: str | None = None) -> dict[str, Any]:
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            return {"choices": [said | {"finish_reason": finish_reason}], "usage": None}

        if is_chat:
            _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        _chunk(writer, b": keep-alive\n\n")
        await asyncio.sleep(self.first_token)
        for index, start in enumerate(range(0, num_tokens, self.tokens_per_event)):
            if index:
                await asyncio.sleep(self.gap)
            if fault == "hang":
                await asyncio.sleep(60)
            if fault == "drop" and index == 2:
                writer.close()
                return
            if fault == "error" and index == 2:
                _event(writer, {"error": {"message": "the engine died"}})
                break
            if fault != "empty":
                _event(writer, event("la" * min(self.tokens_per_event, num_tokens - start)))
        _event(writer, event("", "length"))
        if fault not in ("no usage", "error"):
            num_completion = 0 if fault == "empty" else num_tokens
            usage = {"prompt_tokens": 7, "completion_tokens": num_completion}
            _event(writer, {"choices": [], "usage": usage | {"prompt_tokens_details": None}})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _send(writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _chunk(writer, f"data: {json.dumps(event)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@pytest.fixture
def script() -> Iterator[Script]:
    """A script, and a server in a thread that follows it."""
    script = Script()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(script.serve, "127.0.0.1", 0))
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield script
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()


def measure(script: Script, **options: Any) -> ServeResult:
    defaults: dict[str, Any] = {"num_requests": 8, "num_warmups": 0, "output_len": "5"}
    return run(run_serve(ServeConfig(url=script.url, **defaults | options)))


def only(result: ServeResult) -> LoadResult:
    assert len(result.loads) == 1
    return result.loads[0]


def p50(figures: Distribution | None) -> float:
    assert figures is not None
    return figures.p50


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_latencies_are_those_of_the_script(script: Script, endpoint: str) -> None:
    script.first_token, script.gap = 0.1, 0.02
    load = only(measure(script, endpoint=endpoint, concurrency=4))
    assert (load.num_completed, load.num_output_tokens, load.num_prompt_tokens) == (8, 40, 56)
    # How much later they are is a matter of what else the machine does.
    assert 0.1 <= p50(load.ttft) < 0.18
    assert p50(load.tpot) == pytest.approx(0.02, rel=0.5)
    assert p50(load.itl) == pytest.approx(0.02, rel=0.5)
    assert 0.18 <= p50(load.e2e) < 0.5
    assert load.duration >= 2 * 0.18
    assert load.output_throughput == pytest.approx(40 / load.duration)
    assert load.total_throughput == pytest.approx(96 / load.duration)


def test_tokens_are_counted_by_the_server_not_by_events(script: Script) -> None:
    script.gap, script.tokens_per_event = 0.03, 3
    load = only(measure(script, output_len="9"))
    assert load.num_output_tokens == 72
    assert p50(load.itl) == pytest.approx(0.03, rel=0.5)  # a gap an event, as vLLM counts
    assert p50(load.tpot) == pytest.approx(0.06 / 8, rel=0.5)


def test_requests_say_what_the_load_is(script: Script) -> None:
    result = measure(script, input_len="3:9", output_len="2:4", prefix_len=4, api_key="secret")
    assert set(script.keys) == {"Bearer secret"}
    assert "secret" not in json.dumps(result.to_dict())
    prompts = [request.pop("prompt") for request in script.asked]
    assert {len(prompt) for prompt in prompts} <= set(range(7, 14))
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    for request in script.asked:
        assert 2 <= request.pop("max_tokens") <= 4
        assert request == {
            "model": "tale",
            "temperature": 0.6,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    assert result.server == {"url": script.url, "model": "tale", "version": "1.2.3"}


def test_only_a_server_known_to_take_it_is_asked_to_ignore_the_end(script: Script) -> None:
    script.has_version = False
    assert "version" not in measure(script).server
    assert all("ignore_eos" not in request for request in script.asked)
    measure(script, ignore_eos=True)
    assert script.asked[-1]["ignore_eos"] is True


def test_chat_asks_in_words(script: Script) -> None:
    measure(script, endpoint="chat", input_len="6", num_requests=1)
    (message,) = script.asked[0]["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 6


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        ("503", "HTTP 503", "full"),
        ("drop", "connection", "broke off"),
        ("error", "error in the stream", "the engine died"),
        ("no usage", "no usage", ""),
        ("empty", "no tokens", ""),
        ("hang", "timeout", "no end after 0.3 s"),
    ],
)
def test_failures_are_told_apart_and_left_out_of_the_figures(
    script: Script, fault: str, kind: str, detail: str
) -> None:
    script.fault, script.faulty = fault, 4
    load = only(measure(script, output_len="4:5", num_requests=12, timeout=0.3))
    num_faulty = sum(request["max_tokens"] == 4 for request in script.asked)
    assert 0 < num_faulty < 12
    assert load.errors == {kind: num_faulty}
    assert load.first_error is not None
    assert detail in load.first_error
    assert load.num_completed == 12 - num_faulty
    assert load.num_output_tokens == 5 * load.num_completed


def test_load_that_nothing_survives_has_no_latencies(script: Script) -> None:
    script.fault = "503"
    result = measure(script)
    load = only(result)
    assert (load.num_completed, load.ttft, load.e2e) == (0, None, None)
    assert load.output_throughput == 0
    plot_loads(result.loads)


def test_warm_up_fails_loudly_and_does_not_count(script: Script) -> None:
    assert only(measure(script, num_warmups=3)).num_requests == 8
    assert len(script.asked) == 11
    script.fault = "503"
    with pytest.raises(InvalidRequestError, match=r"fails the warm-up: HTTP 503: .*full"):
        measure(script, num_warmups=1)


def test_open_loop_counts_from_the_intended_moment(script: Script) -> None:
    """A client that stands still for 0.3 s owns up to it, and does not thin out the load."""

    async def stalled() -> tuple[list[Record], ClientLoad]:
        target = Target(HTTPClient(script.url), "/v1/completions", 10)
        body = json.dumps({"max_tokens": 2}).encode()
        asyncio.get_running_loop().call_later(0.05, _block, 0.3)
        return await run_load(target.ask, [body] * 20, Load(request_rate=100))

    records, client = run(stalled())
    load = summarize(records, client, Load(request_rate=100), {})
    assert load.late is not None
    assert load.late.max > 0.1
    assert load.ttft is not None
    assert load.ttft.max >= load.late.max
    assert load.is_client_slow


def _block(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_connections_are_kept(script: Script) -> None:
    measure(script, concurrency=2, num_requests=20)
    assert script.num_connections == 2


def test_gaps_are_exponential() -> None:
    times = send_times(4000, 8.0, seed=0)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert times[0] == 0
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)
    assert times == send_times(4000, 8.0, seed=0)
    assert set(send_times(5, math.inf, seed=0)) == {0.0}


def test_sweep_runs_each_load_with_prompts_of_its_own(script: Script) -> None:
    result = measure(script, sweep="concurrency=1,2,4", num_requests=4, input_len="20")
    assert [str(load.load) for load in result.loads] == [
        "1 at a time",
        "2 at a time",
        "4 at a time",
    ]
    prompts = [tuple(request["prompt"]) for request in script.asked]
    assert len(set(prompts)) == 12


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({}, [Load(math.inf, None)]),
        ({"request_rate": 8.0}, [Load(8.0, None)]),
        ({"concurrency": 4}, [Load(concurrency=4)]),
        ({"sweep": "1,2.5"}, [Load(1.0, None), Load(2.5, None)]),
        ({"sweep": "rate=1,inf"}, [Load(1.0, None), Load(math.inf, None)]),
        ({"sweep": "concurrency=1,8"}, [Load(concurrency=1), Load(concurrency=8)]),
    ],
)
def test_loads_of_a_test(options: dict[str, Any], loads: list[Load]) -> None:
    assert ServeConfig(**options).loads() == loads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_requests": 0}, "num_requests must be at least 1"),
        ({"request_rate": 0.0}, "request_rate must be at least"),
        ({"request_rate": math.nan}, "request_rate must be at least"),
        ({"request_rate": 1.0, "concurrency": 1}, "exclude each other"),
        ({"sweep": "1,2", "concurrency": 1}, "exclude each other"),
        ({"sweep": "rate=1,fast"}, "sweep must be"),
        ({"sweep": "speed=1"}, "sweep must be"),
        ({"sweep": "concurrency=0"}, "sweep must be"),
        ({"sweep": "concurrency=1.5"}, "sweep must be"),
        ({"sweep": "rate=2,-1"}, "sweep must be"),
        ({"input_len": "9:3"}, "input_len must be at least 1 and rise"),
        ({"input_len": "0"}, "input_len must be at least 1"),
        ({"output_len": "long"}, "output_len must be N or LOW:HIGH"),
        ({"slo": "ttft=200"}, "slo must look like"),
        ({"slo": "itl=200ms"}, "slo takes ttft, tpot and e2e"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ServeConfig(**options)


def test_prompts_are_the_seed_s() -> None:
    source = ServeConfig(input_len="1:9", prefix_len=16, num_prefixes=3, vocab_size=50).source()
    prompts = first(source, 200, "0")
    assert prompts == first(source, 200, "0")
    assert prompts != first(source, 200, "1")
    ids = [prompt.content for prompt in prompts if isinstance(prompt.content, list)]
    assert len({tuple(content[:16]) for content in ids}) == 3
    assert {len(content) for content in ids} == set(range(17, 26))
    assert {i for content in ids for i in content} == set(range(50))


def test_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = (
        '{"prompt": "Once\u2028", "max_tokens": 3}',
        "",
        '{"prompt": [1, 2], "output_tokens": 4}',
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    source = ServeConfig(prompts=path).source()
    bodies = [prompt.body(is_chat=False) for prompt in first(source, 4, "0")]
    assert bodies[:2] == bodies[2:]
    assert {"prompt": "Once\u2028", "max_tokens": 3} in bodies
    assert {"prompt": [1, 2], "max_tokens": 4} in bodies
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    chat = ServeConfig(prompts=path, endpoint="chat", output_len="6").source()
    assert first(chat, 1, "0")[0].body(is_chat=True) == {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 6,
    }
    for text, message in (
        ("\n{", "line 2 is not JSON"),
        ('{"text": 1}', "line 1 has no 'prompt'"),
        ("[1]", "line 1 has no 'prompt'"),
        ("", "has no prompts"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidRequestError, match=message):
            ServeConfig(prompts=path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InvalidRequestError, match="is not UTF-8"):
        ServeConfig(prompts=path)


def record(first_token: float, num_tokens: int, end: float) -> Record:
    times = [first_token, end][: min(num_tokens, 2)]
    return Record(0.0, 0.0, times, times[-1], num_output_tokens=num_tokens)


def test_definitions_by_hand() -> None:
    records = [record(0.1, 11, 1.1), record(0.3, 1, 0.3), record(0.2, 6, 2.2)]
    slo = parse_slo("ttft=250ms, tpot=0.2s,e2e=3s")
    load = summarize(records, ClientLoad(), Load(concurrency=1), slo)
    assert load.tpot is not None
    assert load.tpot.mean == pytest.approx((0.1 + 0.4) / 2)  # a single token has none
    assert load.num_good == 1
    assert load.goodput == pytest.approx(1 / 2.2)
    assert load.loop_lag is None
    figures = Distribution.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert figures is not None
    assert (figures.mean, figures.p50, figures.max) == (3, 3, 5)
    assert figures.p90 == pytest.approx(4.6)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"SSH-2.0-x\r\n\r\n", "no HTTP/1.1 response"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", "broke off"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "broke off"),
        (b"", "unanswered"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "has no end"),
    ],
)
def test_client_says_what_is_not_http(answer: bytes, error: str) -> None:
    async def ask() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            client = HTTPClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            async with client.send("GET", "/") as response:
                await response.read()

    with pytest.raises(ProtocolError, match=error):
        asyncio.run(ask())


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "http:///v1", "http://h:99999", "http://[::1"]
)
def test_client_wants_a_url(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is not an?( http or https)? URL"):
        HTTPClient(url)


def test_command_prints_and_writes_figures(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], wide: None
) -> None:
    arguments = ["bench", "serve", "--url", f"{script.url}/v1", "--num-requests", "4"]
    main([*arguments, "--slo", "ttft=1s", "--json", str(tmp_path / "figures.json")])
    shown = capsys.readouterr().out
    for words in ("time to first token (TTFT)", "goodput", "event loop late", "hardware", "tale"):
        assert words in shown
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loads"][0]["num_completed"] == 4
    assert figures["loads"][0]["load"] == {"request_rate": None, "concurrency": None}
    assert figures["machine"]["versions"]["nanovllm"]
    plot = tmp_path / "plot.svg"
    main([*arguments, "--sweep", "1000,2000", "--json", "--plot", str(plot)])
    assert len(json.loads(capsys.readouterr().out)["loads"]) == 2
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    main([*arguments, "--sweep", "concurrency=1,2"])
    assert "2 at a time" in capsys.readouterr().out


def test_environment_of_the_engine_is_not_the_client_s(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_MODEL", "elsewhere")
    monkeypatch.setenv("NANOVLLM_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "4")
    main(["bench", "serve", "--url", script.url, "--num-requests", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["server"]["model"] == "tale"


def test_command_says_that_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", "--url", "http://127.0.0.1:9"])
    assert caught.value.code == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
