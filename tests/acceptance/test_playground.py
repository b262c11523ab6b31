"""The playground at `/`, used as a reader does: in a browser, against a live server."""

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests.server_client import recording
from tests.serving import Server, serve

pytest.importorskip("playwright")

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

pytestmark = pytest.mark.accept

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
LONG_MS = 15_000
CHAT, COMPLETIONS = "**/v1/chat/completions", "**/v1/completions"
SPEECH = "**/v1/audio/speech"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        if CHROMIUM is None and not Path(chromium.executable_path).exists():
            pytest.skip("there is no Chromium")
        launched = chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A fresh visit of the page; whatever the browser complains of fails the test."""
    with visit(browser, server) as visited:
        yield visited


class visit:  # noqa: N801  # a context manager that reads as a verb
    """A page in a context of its own, so that nothing is left of other tests."""

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self._context = browser.new_context(accept_downloads=True, **options)
        self._url = server.url
        self._complaints: list[str] = []

    def __enter__(self) -> Page:
        page = self._context.new_page()
        page.set_default_timeout(LONG_MS)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("console", self._note)
        page.goto(self._url)
        return page

    def __exit__(self, *_: object) -> None:
        self._context.close()
        assert not self._complaints

    def _note(self, message: ConsoleMessage) -> None:
        # Chromium reports each call that fails; these the tests provoke.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self._complaints.append(message.text)


def send(page: Page, text: str, **parameters: float) -> None:
    for name, value in parameters.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_label("Your text").fill(text)
    page.get_by_label("Your text").press("Enter")


def wait_for_end(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=LONG_MS)


def answers(page: Page) -> list[str]:
    texts: list[str] = page.locator(".panel:not([hidden]) .answer").all_inner_texts()
    return texts


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gauges(server: Server) -> tuple[int, int, float]:
    stats = server.get("/metrics.json")[1]
    return stats["num_running"], stats["inflight_total"], stats["kv_cache_usage"]


def reply(*texts: str) -> Callable[[Route], None]:
    """Answer a request in the server's place with these pieces of text."""
    chunks = [{"choices": [{"delta": {"content": text}, "text": text}]} for text in texts]
    events = [*map(json.dumps, chunks), "[DONE]"]
    body = ": keep-alive\r\n\r\n" + "".join(f"data: {event}\r\n\r\n" for event in events)
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def reply_with(*deltas: dict[str, str]) -> Callable[[Route], None]:
    """The same, with deltas of any kind."""
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
    body = "".join(f"data: {event}\n\n" for event in [*map(json.dumps, chunks), "[DONE]"])
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def endlessly(route: Route) -> None:
    """Let a request through that goes on until it is stopped: the model might end early."""
    body = body_of(route.request) | {"ignore_eos": True, "max_tokens": 3000}
    route.continue_(post_data=json.dumps(body))


def body_of(request: Request) -> Any:
    return json.loads(request.post_data or "")


def refuse(status: int, message: str, **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
    headers["Content-Type"] = "application/json"
    return lambda route: route.fulfill(status=status, body=body, headers=headers)


# What it is for


def test_a_chat_streams_with_its_figures(page: Page) -> None:
    expect(page.locator("#model")).to_have_text("demo_model")
    send(page, "Tell me a tale.", seed=1, max_tokens=400)
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_visible()
    answer = page.locator("#panel-chat .answer")
    expect(answer).to_have_text(re.compile(r"\w+ \w+"))
    seen = answer.inner_text()
    expect(stop).to_be_visible()
    wait_for_end(page)
    assert answer.inner_text().startswith(seen)
    assert len(answer.inner_text()) > len(seen)
    expect(page.locator(".figures")).to_have_text(
        re.compile(r"TTFT [\d.]+ m?s +· +[\d.]+ tokens/s +· +\d+ tokens")
    )


def test_a_completion_reads_on_from_its_prompt(page: Page) -> None:
    page.get_by_role("tab", name="Complete").click()
    with page.expect_request(COMPLETIONS) as request:
        page.get_by_role("button", name="Once upon a time").click()
        wait_for_end(page)
    assert body_of(request.value)["prompt"] == "Once upon a time"
    first = answers(page)[0]
    ends, begins = page.locator("#panel-complete").evaluate("""node => [
        node.querySelector(".prompt").getClientRects()[0].right,
        node.querySelector(".answer").getClientRects()[0].left,
    ]""")
    assert ends == begins
    with page.expect_request(COMPLETIONS) as request:
        page.get_by_role("button", name="Continue").click()
        wait_for_end(page)
    assert body_of(request.value)["prompt"] == f"Once upon a time{first}"


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_request_on_the_server(page: Page, server: Server, how: str) -> None:
    page.route(CHAT, endlessly)
    send(page, "Tell me a tale.")
    expect(page.locator("#panel-chat .answer")).to_have_text(re.compile(r"\w+ \w+"))
    wait_until(lambda: gauges(server)[:2] == (1, 1))
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    wait_for_end(page)
    wait_until(lambda: gauges(server) == (0, 0, 0.0))
    expect(page.locator(".figures")).to_contain_text("stopped")
    assert answers(page)[0]


def test_parameters_and_system_prompt_reach_the_request(page: Page) -> None:
    parameters = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_tokens": 8,
        "seed": 7,
    }
    page.get_by_label("System prompt").fill("Be brief.")
    with page.expect_request(CHAT) as request:
        send(page, "Who are you?", **parameters)
    body = body_of(request.value)
    assert parameters.items() <= body.items()
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["model"] == "demo_model"
    wait_for_end(page)
    expect(page.locator(".figures")).to_contain_text("8 tokens")


def test_what_is_not_set_is_not_sent(page: Page) -> None:
    page.get_by_label("Temperature slider").press("ArrowRight")
    with page.expect_request(CHAT) as request:
        send(page, "Hello")
    assert body_of(request.value).keys() == {
        *("model", "messages", "temperature", "max_tokens", "stream", "stream_options")
    }
    assert body_of(request.value)["temperature"] == 1.05
    page.get_by_role("button", name="Stop").or_(page.get_by_role("button", name="Send")).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("")


def test_a_conversation_goes_on_and_its_last_exchange_can_be_changed(page: Page) -> None:
    requests: list[Any] = []

    def note(route: Route) -> None:
        requests.append(body_of(route.request))
        reply("A")(route)

    page.route(CHAT, note)
    send(page, "one")
    wait_for_end(page)
    send(page, "two")
    wait_for_end(page)
    assert [m["content"] for m in requests[-1]["messages"]] == ["one", "A", "two"]
    page.get_by_role("button", name="Regenerate").click()
    wait_for_end(page)
    assert [m["content"] for m in requests[-1]["messages"]] == ["one", "A", "two"]
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Your text")).to_have_value("two")
    page.get_by_label("Your text").fill("three")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert [m["content"] for m in requests[-1]["messages"]] == ["one", "A", "three"]
    page.get_by_role("button", name="Clear").click()
    assert answers(page) == []
    expect(page.get_by_text("Start a conversation.")).to_be_visible()


def test_the_strip_shows_what_the_engine_does(page: Page) -> None:
    running = page.locator("[data-series=running] span")
    expect(running).to_have_text("0")
    page.route(CHAT, endlessly)
    send(page, "Tell me a tale.")
    expect(running).to_have_text("1")
    expect(page.locator("[data-series=throughput] span")).not_to_have_text(re.compile(r"^0|^\W"))
    line = page.locator("[data-series=throughput] polyline")
    expect(line).to_have_attribute("points", re.compile(r"\d+,\d+ \d+,\d+"))
    page.keyboard.press("Escape")
    expect(running).to_have_text("0")


def test_a_server_without_speech_says_so(page: Page) -> None:
    page.get_by_role("tab", name="Speech").click()
    expect(page.get_by_text("This server has no model that speaks")).to_be_visible()
    expect(page.get_by_label("Your text")).to_be_hidden()


# Speech


@pytest.fixture(scope="module")
def speaking(speech_checkpoint: Callable[..., Path]) -> Iterator[Server]:
    """A server that writes and speaks; what it says is 0.4 s long."""
    speaker = str(speech_checkpoint("v1", stop_bias=1.0))
    with serve(speech_model=speaker, speech_served_model_name=["tts"]) as running:
        yield running


@pytest.fixture
def speech_page(browser: Browser, speaking: Server) -> Iterator[Page]:
    with visit(browser, speaking) as visited:
        expect(visited.locator("#model")).to_have_text("demo_model · tts")
        visited.get_by_role("tab", name="Speech").click()
        yield visited


def test_speech_is_played(speech_page: Page) -> None:
    with speech_page.expect_request(SPEECH) as request:
        send(speech_page, "Hello there.")
    body = body_of(request.value)
    assert body == {"model": "tts", "input": "Hello there.", "response_format": "pcm"}
    wait_for_end(speech_page)
    figures = speech_page.locator("#panel-speech .figures")
    expect(figures).to_have_text(re.compile(r"first sound \d+ ms.*0\.\d\d s.*RTF \d"))
    with speech_page.expect_request(SPEECH):
        speech_page.get_by_role("button", name="Regenerate").click()
    wait_for_end(speech_page)
    expect(figures).to_have_text(re.compile("RTF"))


def test_speech_is_heard_to_its_end(speech_page: Page) -> None:
    """An audio context that is closed plays nothing of what is scheduled."""
    speech_page.evaluate(
        """() => {
            const { start } = AudioBufferSourceNode.prototype;
            AudioBufferSourceNode.prototype.start = function (at) {
                window.scheduledTo = at + this.buffer.duration;
                return start.call(this, at);
            };
            const { close } = AudioContext.prototype;
            AudioContext.prototype.close = function () {
                window.closedAt = this.currentTime;
                return close.call(this);
            };
        }"""
    )
    send(speech_page, "Hello there.")
    wait_for_end(speech_page)
    assert speech_page.evaluate("closedAt >= scheduledTo && scheduledTo > 0.3")


def test_speech_can_be_stopped(speech_page: Page, speaking: Server) -> None:
    def forever(route: Route) -> None:
        body = body_of(route.request) | {"min_len": 300, "max_generate_length": 300}
        long = {"input": "word " * 60, **{k: v for k, v in body.items() if k != "input"}}
        route.continue_(post_data=json.dumps(long))

    speech_page.route(SPEECH, forever)
    send(speech_page, "Hello there.")
    expect(speech_page.locator("#panel-speech .figures")).to_have_text(re.compile("first sound"))
    speech_page.get_by_role("button", name="Stop").click()
    wait_for_end(speech_page)
    expect(speech_page.locator("#panel-speech .figures")).to_have_text("stopped")
    deadline = time.monotonic() + 5
    while speaking.get("/metrics.json")[1]["num_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert speaking.get("/metrics.json")[1]["num_running"] == 0


def test_a_voice_is_added_and_used(speech_page: Page) -> None:
    if speech_page.locator("#settings").is_hidden():
        speech_page.get_by_role("button", name="Settings").click()
    file: Any = {"name": "ann.wav", "mimeType": "audio/wav", "buffer": recording()}
    speech_page.get_by_label("Recording of a voice").set_input_files(file)
    speech_page.get_by_label("What the recording says").fill("Hi, I am Ann.")
    speech_page.get_by_role("button", name="Add the voice").click()
    chosen = speech_page.locator("#voice option:checked")
    expect(chosen).to_have_text("ann")
    with speech_page.expect_request(SPEECH) as request:
        send(speech_page, "Hello there.")
    assert body_of(request.value)["voice"] == chosen.get_attribute("value")
    wait_for_end(speech_page)
    speech_page.get_by_role("button", name="Add the voice").click()
    expect(speech_page.locator("#notice")).to_contain_text("already")


def test_a_server_that_only_speaks(
    browser: Browser, speech_checkpoint: Callable[..., Path]
) -> None:
    with serve(speech_checkpoint("v1", stop_bias=1.0)) as server, visit(browser, server) as page:
        expect(page.get_by_role("tab", name="Speech")).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tab", name="Chat")).to_be_hidden()
        send(page, "Hello there.")
        wait_for_end(page)
        expect(page.locator("#panel-speech .figures")).to_have_text(re.compile("RTF"))


# The request as it is, and conversations as files


def test_the_curl_command_sends_the_same_request(page: Page, server: Server) -> None:
    page.locator("#max_tokens").fill("4")
    page.get_by_label("Your text").fill('It\'s a "test" of $HOME and `ls` \\ é')
    page.get_by_role("button", name="Request").click()
    command = page.get_by_label("curl").inner_text()
    shown = json.loads(page.get_by_label("JSON").inner_text())
    assert json.loads(shlex.split(command)[-1]) == shown
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#request section", has=page.get_by_label("curl")).get_by_text("Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == command
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("data: [DONE]")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#request")).to_be_hidden()


def test_a_conversation_can_be_exported_and_imported(page: Page, tmp_path: Path) -> None:
    page.route(CHAT, reply("B", "ee"))
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "one", seed=3)
    wait_for_end(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    assert json.loads(file.read_text())["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Bee"},
    ]
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("System prompt").fill("")
    page.get_by_role("button", name="Reset").click()
    page.locator("#import-file").set_input_files(file)
    expect(page.locator("#panel-chat .answer")).to_have_text("Bee")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Seed")).to_have_value("3")


@pytest.mark.parametrize(
    "content", ["{", "null", '{"messages": 3}', '{"messages": [{"role": "assistant"}]}', "[null]"]
)
def test_a_file_that_is_no_conversation_is_refused(page: Page, content: str) -> None:
    file: Any = {"name": "x.json", "mimeType": "application/json", "buffer": content.encode()}
    page.locator("#import-file").set_input_files(file)
    expect(page.locator("#notice")).to_contain_text("x.json cannot be imported")


def test_a_reload_loses_nothing(page: Page) -> None:
    page.route(CHAT, reply("B"))
    send(page, "one", seed=3)
    wait_for_end(page)
    page.reload()
    expect(page.locator("#panel-chat .answer")).to_have_text("B")
    expect(page.get_by_label("Seed")).to_have_value("3")


# What goes wrong


def test_an_error_is_shown_and_can_be_retried(page: Page) -> None:
    page.route(CHAT, refuse(503, "too many requests wait", **{"Retry-After": "2"}))
    send(page, "Hello")
    failure = page.locator(".failure")
    expect(failure).to_contain_text("too many requests wait Try again in 2 s.")
    page.unroute(CHAT)
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    expect(failure).to_be_hidden()
    assert answers(page)[0]


def test_the_servers_own_words_are_shown(page: Page) -> None:
    send(page, "word " * 5000)
    expect(page.locator(".failure")).to_contain_text("maximum context length is 4096 tokens")
    send(page, "Hello", max_tokens=4)
    wait_for_end(page)
    assert answers(page)[1]


def test_an_error_in_the_stream_leaves_what_came_before(page: Page) -> None:
    events = ['{"choices":[{"delta":{"content":"Half"}}]}', '{"error":{"message":"it broke"}}']
    body = "".join(f"data: {event}\n\n" for event in events)
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    send(page, "Hello")
    expect(page.locator(".failure")).to_contain_text("it broke")
    assert answers(page) == ["Half"]


def test_a_broken_connection_is_told(page: Page) -> None:
    page.route(CHAT, lambda route: route.fulfill(body="", content_type="text/event-stream"))
    send(page, "Hello")
    expect(page.locator(".failure")).to_contain_text("connection broke off")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".failure")).to_contain_text("cannot be reached")


def test_thoughts_are_folded_away(page: Page) -> None:
    thoughts = [{"reasoning_content": "Let me "}, {"reasoning_content": "see."}]
    page.route(CHAT, reply_with(*thoughts, {"content": "Nothing."}))
    send(page, "What is there?")
    wait_for_end(page)
    assert answers(page) == ["Nothing."]
    assert page.locator(".thinking p").text_content() == "Let me see."
    page.unroute(CHAT)
    page.route(CHAT, reply_with({"content": "Something."}))
    page.get_by_role("button", name="Regenerate").click()
    wait_for_end(page)
    expect(page.locator(".thinking")).to_be_hidden()


def test_markup_is_text(page: Page) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    page.route(CHAT, reply("<think>", attack, "</think>", attack))
    send(page, attack)
    wait_for_end(page)
    assert answers(page) == [attack]
    assert page.locator(".prompt").inner_text() == attack
    assert page.locator(".thinking p").text_content() == attack
    assert page.locator("main img, main script").count() == 0
    page.unroute(CHAT)
    page.route(CHAT, refuse(400, attack))
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".failure p")).to_have_text(attack)
    assert page.title() == "nanovllm playground"


def test_the_browser_refuses_markup_even_if_the_page_did_not(
    browser: Browser, server: Server
) -> None:
    page = browser.new_page()
    page.goto(server.url)
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>'; }")
    page.close()


# Who uses it


def test_it_needs_no_mouse(page: Page) -> None:
    page.locator("h1").click()
    page.keyboard.press("/")
    expect(page.get_by_label("Your text")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two/")
    expect(page.get_by_label("Your text")).to_have_value("one\ntwo/")
    page.route(CHAT, reply("B"))
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert page.locator(".prompt").inner_text() == "one\ntwo/"
    expect(page.get_by_label("Your text")).to_be_focused()
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Complete")).to_be_focused()
    expect(page.locator("#panel-complete")).to_be_visible()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
        outline = page.evaluate("""() => {
            const node = document.activeElement;
            const ring = node.id === "prompt" ? node.parentElement : node;
            return node === document.body ? "solid" : getComputedStyle(ring).outlineStyle;
        }""")
        assert outline == "solid"
    assert {"theme", "toggle-settings", "temperature", "api-key", "prompt", "export"} <= reached


def test_a_phone_scrolls_one_way_only(browser: Browser, server: Server) -> None:
    with visit(browser, server, viewport={"width": 360, "height": 640}, has_touch=True) as page:
        width = "() => document.documentElement.scrollWidth"
        expect(page.locator("#settings")).to_be_hidden()
        page.route(CHAT, reply("W" * 300, " and on"))
        send(page, "x" * 300)
        wait_for_end(page)
        assert page.evaluate(width) == 360
        page.get_by_role("button", name="Settings").tap()
        expect(page.locator("#settings")).to_be_in_viewport(ratio=0.9)
        assert page.evaluate(width) == 360
        page.keyboard.press("Escape")
        expect(page.locator("#settings")).to_be_hidden()
        page.get_by_role("button", name="Request").tap()
        expect(page.locator("#request")).to_be_visible()
        assert page.evaluate(width) == 360


def test_a_reader_who_scrolled_up_is_left_there(page: Page) -> None:
    page.route(CHAT, reply("\n".join(map(str, range(200)))))
    send(page, "Count.")
    wait_for_end(page)
    panel = page.locator("#panel-chat")
    from_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    assert panel.evaluate(from_end) < 2
    page.unroute(CHAT)
    page.route(CHAT, endlessly)
    send(page, "Tell me a tale.")
    expect(page.locator(".answer").nth(1)).to_have_text(re.compile(r"\w+"))
    panel.hover()
    page.mouse.wheel(0, -2000)
    latest = page.get_by_role("button", name="Jump to the latest")
    expect(latest).to_be_visible()
    top = panel.evaluate("node => node.scrollTop")
    page.wait_for_timeout(700)
    assert panel.evaluate("node => node.scrollTop") == top
    latest.click()
    expect(latest).to_be_hidden()
    page.wait_for_timeout(700)
    assert panel.evaluate(from_end) < 48
    page.keyboard.press("Escape")
    wait_for_end(page)


def test_both_themes_and_the_choice_is_kept(browser: Browser, server: Server) -> None:
    background = "() => getComputedStyle(document.documentElement).backgroundColor"
    with visit(browser, server, color_scheme="dark") as page:
        dark = page.evaluate(background)
        page.get_by_role("button", name="Theme: auto").click()
        light = page.evaluate(background)
        assert light != dark
        page.reload()
        expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
        assert page.evaluate(background) == light


def test_it_asks_no_other_host(page: Page, server: Server) -> None:
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/v1")[0].split("/play")[0]))
    page.reload()
    send(page, "Hello", max_tokens=4)
    wait_for_end(page)
    assert {url for url in hosts if not url.startswith((server.url, "blob:"))} == set()


# Keys, and how the files are served


def test_the_page_is_open_and_its_calls_bring_the_key(browser: Browser) -> None:
    with serve(api_key=["sesame"]) as locked, visit(browser, locked) as page:
        assert locked.get("/health")[0] == 200
        expect(page.locator("#model")).to_have_text("key needed")
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        send(page, "Hello", max_tokens=4)
        expect(page.locator(".failure")).to_contain_text("wants an API key")
        field.fill("sesame")
        field.press("Tab")
        expect(page.locator("#model")).to_have_text("demo_model")
        page.get_by_role("button", name="Retry").click()
        wait_for_end(page)
        assert answers(page)[0]
        page.get_by_role("button", name="Request").click()
        assert "sesame" not in page.locator("#request").inner_text()
        assert page.evaluate("() => Object.values(localStorage).join()").count("sesame") == 0
        assert page.evaluate("() => Object.values(sessionStorage)").count("sesame") == 1


def test_files_have_their_headers_and_are_not_sent_twice(server: Server) -> None:
    status, _, html = fetch(server, "/")
    assert status == 200
    paths = ["/", *(f"/{link}" for link in re.findall(r'"(playground/[^"]+)"', html.decode()))]
    assert len(paths) == 4
    for path in paths:
        status, headers, content = fetch(server, path)
        assert status == 200
        assert content
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        status, _, content = fetch(server, path, {"If-None-Match": headers["ETag"]})
        assert (status, content) == (304, b"")
    for path in ("/playground/__init__.py", "/playground/../auth.py", "/playground/%2e%2e/auth.py"):
        assert fetch(server, path)[0] == 404


def fetch(
    server: Server, path: str, headers: Mapping[str, str] | None = None
) -> tuple[int, Message, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content
