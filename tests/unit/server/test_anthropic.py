"""`/v1/messages`: Anthropic's words for requests, answers, streams and errors."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.errors import EngineDeadError
from nanovllm.server.anthropic.events import SIGNATURE, BlockEvents
from nanovllm.server.anthropic.requests import MAX_PIECES
from nanovllm.server.chat.run import ChatNews, MadeCall
from nanovllm.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from tests.fake_llm import FakeLLM
from tests.server_client import HI, build, call

PATH = "/v1/messages"
AGENT = Path(__file__).parents[1] / "chat_templates" / "agent.jinja"
COUNT = "/v1/messages/count_tokens"
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": "wet"}


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    """A success's body."""
    response = client.post(PATH, json={"max_tokens": 16, "messages": HI, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error_of(response: Any, status: int) -> dict[str, str]:
    """The error of a response, which must have Anthropic's body."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    error: dict[str, str] = body["error"]
    assert set(error) - {"details"} == {"type", "message"}
    assert error["message"]
    return error


def refused(client: TestClient, **body: Any) -> str:
    """What a bad request is told."""
    body = {"max_tokens": 16, "messages": HI, **body}
    error = error_of(client.post(PATH, json=body), 400)
    assert error["type"] == "invalid_request_error"
    return error["message"]


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which says its type twice."""
    events = []
    for block in text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


def streamed(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    body = {"max_tokens": 16, "messages": HI, "stream": True, **body}
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def prompt_of(llm: FakeLLM) -> str:
    prompt = llm.submitted[-1][0].prompt
    assert prompt is not None
    return prompt


class TestWhole:
    def test_message(self, client: TestClient) -> None:
        answer = ask(client, model="demo_model")
        assert answer.pop("id").startswith("msg_")
        usage = answer.pop("usage")
        assert answer == {
            "type": "message",
            "role": "assistant",
            "model": "demo_model",
            "content": [{"type": "text", "text": " upon a time"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
        }
        num_prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        counted = client.post(COUNT, json={"messages": HI})
        assert counted.json() == {"input_tokens": num_prompt}
        assert usage["output_tokens"] == 4

    def test_max_tokens(self, client: TestClient, llm: FakeLLM) -> None:
        assert ask(client, max_tokens=2)["stop_reason"] == "max_tokens"
        llm.max_model_len = 16
        assert ask(client, max_tokens=2)["stop_reason"] == "max_tokens"

    def test_more_than_there_is_room_for(self) -> None:
        llm = FakeLLM(max_model_len=16)
        client = TestClient(build(llm))
        answer = ask(client, max_tokens=32000)
        assert answer["stop_reason"] in ("end_turn", "model_context_window_exceeded")
        long = [{"role": "user", "content": "word " * 64}]
        assert "maximum context length" in refused(client, messages=long)

    def test_stop_sequence(self, client: TestClient) -> None:
        answer = ask(client, stop_sequences=["X", " a"])
        assert answer["stop_reason"] == "stop_sequence"
        assert answer["stop_sequence"] == " a"
        assert answer["content"] == [{"type": "text", "text": " upon"}]

    def test_nothing_at_all(self) -> None:
        answer = ask(TestClient(build(FakeLLM(reply=""))))
        assert (answer["content"], answer["stop_reason"]) == ([], "end_turn")

    def test_request_id(self, client: TestClient) -> None:
        body = {"max_tokens": 4, "messages": HI}
        response = client.post(PATH, json=body, headers={"X-Request-Id": "mine"})
        assert response.json()["id"] == "msg_mine"
        assert response.headers["request-id"] == response.headers["x-request-id"] == "mine"

    def test_an_adapter(self, client: TestClient, llm: FakeLLM) -> None:
        llm.loras["pirate"] = "/adapters/pirate"
        assert ask(client, model="pirate")["model"] == "pirate"
        assert llm.adapted == ["pirate"]

    def test_what_has_no_effect_is_taken(self, client: TestClient) -> None:
        cached = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
        ask(
            client,
            messages=[{"role": "user", "content": [cached]}],
            metadata={"user_id": "me"},
            service_tier="auto",
            context_management={"edits": []},
            thinking={"type": "enabled", "budget_tokens": 1024},
        )

    def test_a_client_that_leaves(self, app: FastAPI, llm: FakeLLM) -> None:
        llm.delay = 0.05
        for streams in (False, True):
            body = {"max_tokens": 99, "messages": HI, "stream": streams}
            asyncio.run(call(app, PATH, body, leave_when=lambda answer: True))
            assert llm.num_open == 0


class TestStream:
    def test_events(self, client: TestClient) -> None:
        events = streamed(client)
        kinds = [event["type"] for event in events]
        assert kinds == [
            "message_start",
            "ping",
            "content_block_start",
            *["content_block_delta"] * 3,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        message = events[0]["message"]
        assert message["content"] == []
        assert message["stop_reason"] is None
        assert message["usage"]["output_tokens"] == 0
        assert events[2]["content_block"] == {"type": "text", "text": ""}
        assert "".join(e["delta"]["text"] for e in events[3:6]) == " upon a time"
        assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert events[-2]["usage"]["output_tokens"] == 4

    def test_a_stop_sequence_is_not_sent(self, client: TestClient) -> None:
        *events, last, _ = streamed(client, stop_sequences=[" time"])
        said = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
        assert said == " upon a"
        assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": " time"}

    def test_nothing_at_all(self) -> None:
        events = streamed(TestClient(build(FakeLLM(reply=""))))
        kinds = [event["type"] for event in events]
        assert kinds == ["message_start", "ping", "message_delta", "message_stop"]

    def test_an_error_after_the_first_token(self, client: TestClient, llm: FakeLLM) -> None:
        llm.fail_after = 2
        last = streamed(client)[-1]
        assert last["type"] == "error"
        assert last["error"]["type"] == "overloaded_error"
        assert llm.num_open == 0


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SAID = f"<think>\nWhere?\n</think>\n\nI look.\n{CALL}\n{CALL}"
CONTENT = [
    {"type": "thinking", "thinking": "Where?", "signature": SIGNATURE},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}},
    {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}},
]


def agent(reply: str) -> TestClient:
    """A server of a model with tools and thoughts, which says this."""
    llm = FakeLLM(reply, max_model_len=4096)
    assert llm.tokenizer is not None
    llm.tokenizer.chat_templates["default"] = AGENT.read_text(encoding="utf-8")
    return TestClient(build(llm))


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that the events of a stream add up to, as Anthropic's client adds them."""
    content: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(content) - 1
            delta = dict(event["delta"])
            kind, (name, text) = delta.pop("type"), next(iter(delta.items()))
            if kind == "input_json_delta":
                inputs[event["index"]] = inputs.get(event["index"], "") + text
            else:
                assert kind == f"{name}_delta"
                content[-1][name] += text
    for index, text in inputs.items():
        content[index]["input"] = json.loads(text)
    return content


class TestAgents:
    def test_thoughts_text_and_calls(self) -> None:
        client = agent(SAID)
        body = {"max_tokens": 999, "tools": [TOOL]}
        whole = ask(client, **body)
        assert whole["stop_reason"] == "tool_use"
        assert whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0
        events = streamed(client, **body)
        for content in (whole["content"], gathered(events)):
            ids = [block.pop("id") for block in content if block["type"] == "tool_use"]
            assert len(set(ids)) == 2
            assert content == CONTENT
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        pieces = [e for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
        assert len(pieces) > 2

    def test_thoughts_that_are_not_shown(self) -> None:
        client = agent(SAID)
        body = {"max_tokens": 999, "thinking": {"type": "adaptive", "display": "omitted"}}
        for content in (ask(client, **body)["content"], gathered(streamed(client, **body))):
            assert content[0] == {"type": "thinking", "thinking": "", "signature": SIGNATURE}
            assert content[1]["text"].startswith("I look.")

    def test_a_call_that_is_cut_short(self) -> None:
        client = agent(CALL)
        whole = ask(client, max_tokens=1)
        num_tokens = ask(client, max_tokens=999, tools=[TOOL])["usage"]["output_tokens"]
        assert whole["stop_reason"] == "max_tokens"
        for limit in range(1, num_tokens - 1):
            answer = ask(client, max_tokens=limit, tools=[TOOL])
            assert answer["stop_reason"] in ("max_tokens", "tool_use")
            for block in answer["content"]:
                assert block["type"] == "text" or isinstance(block["input"], dict)

    @pytest.mark.parametrize(
        "reply", [f"Wait.\n{CALL}\nMore.\n{CALL}\nDone.", f"{CALL}\nDone.", f"A{CALL}B{CALL}"]
    )
    def test_text_behind_calls(self, reply: str) -> None:
        client = agent(reply)
        body = {"max_tokens": 999, "tools": [TOOL]}
        contents = ask(client, **body)["content"], gathered(streamed(client, **body))
        for content in contents:
            for block in content:
                block.pop("id", None)
        assert contents[0] == contents[1]
        assert contents[0][-1]["type"] == ("tool_use" if reply.endswith(CALL) else "text")

    @pytest.mark.parametrize("arguments", ['{"city": "Rome", *}', '{"city": "Rome"', '{"a": [1}'])
    def test_a_call_that_is_not_whole_is_not_to_be_run(self, arguments: str) -> None:
        client = agent(f'<tool_call>\n{{"name": "weather", "arguments": {arguments}')
        answer = ask(client, max_tokens=999, tools=[TOOL])
        assert answer["content"][0]["type"] == "tool_use"
        assert answer["stop_reason"] == "end_turn"

    def test_what_was_said_goes_back(self) -> None:
        client = agent(SAID)
        answer = ask(client, max_tokens=999, tools=[TOOL])
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}
            for block in answer["content"]
            if block["type"] == "tool_use"
        ]
        history = [
            *HI,
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": results},
        ]
        ask(client, messages=history, tools=[TOOL], tool_choice={"type": "none"})
        app: Any = client.app
        prompt = prompt_of(app.state.server.llm)
        assert f"<|im_start|>assistant\n{SAID}<|im_end|>\n" in prompt
        assert prompt.count("<|im_start|>tool\nrain<|im_end|>\n") == 2


class Told:
    """An answer of which only the calls are looked at."""

    def __init__(self) -> None:
        self.tool_calls = [MadeCall("call_0", "weather"), MadeCall("call_1", "time")]


def blocks_of(*deltas: Delta, shows_thoughts: bool = True) -> list[Any]:
    """The events of an answer whose deltas come one by one."""
    choice: Any = Told()
    blocks = BlockEvents(choice, shows_thoughts)
    news = [ChatNews(choice, [delta], None, finished=False) for delta in deltas]
    ended = ChatNews(choice, [], None, finished=True)
    return [event for item in [*news, ended] for event in blocks.of_news(item)]


class TestBlocks:
    def test_thoughts_text_and_calls_in_turn(self) -> None:
        events = blocks_of(
            ReasoningDelta("Hm"),
            ReasoningDelta("."),
            ContentDelta("I "),
            ContentDelta("look."),
            ToolCallDelta(0, "weather", ""),
            ToolCallDelta(0, None, '{"city": '),
            ToolCallDelta(0, None, '"Rome"}'),
            ToolCallDelta(1, "time", "{}"),
        )
        starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        assert starts == [
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "text", "text": ""},
            {"type": "tool_use", "id": "call_0", "name": "weather", "input": {}},
            {"type": "tool_use", "id": "call_1", "name": "time", "input": {}},
        ]
        open_blocks: list[int] = []
        for event in events:
            if event["type"] == "content_block_start":
                assert open_blocks == []
                open_blocks.append(event["index"])
            assert open_blocks == [event["index"]]
            if event["type"] == "content_block_stop":
                open_blocks.pop()
        assert open_blocks == []
        deltas = [(e["index"], e["delta"]) for e in events if "delta" in e]
        assert deltas == [
            (0, {"type": "thinking_delta", "thinking": "Hm"}),
            (0, {"type": "thinking_delta", "thinking": "."}),
            (0, {"type": "signature_delta", "signature": SIGNATURE}),
            (1, {"type": "text_delta", "text": "I "}),
            (1, {"type": "text_delta", "text": "look."}),
            (2, {"type": "input_json_delta", "partial_json": '{"city": '}),
            (2, {"type": "input_json_delta", "partial_json": '"Rome"}'}),
            (3, {"type": "input_json_delta", "partial_json": "{}"}),
        ]

    def test_thoughts_that_are_not_shown(self) -> None:
        events = blocks_of(ReasoningDelta("Hm"), ContentDelta("No."), shows_thoughts=False)
        assert "Hm" not in json.dumps(events)
        assert [e["delta"]["type"] for e in events if "delta" in e] == [
            "signature_delta",
            "text_delta",
        ]


class TestMessages:
    def test_turns_of_one_role_are_one(self, client: TestClient, llm: FakeLLM) -> None:
        ask(
            client,
            system=[
                {"type": "text", "text": "x-anthropic-billing-header: cch=1"},
                {"type": "text", "text": "One."},
                {"type": "text", "text": "Two."},
            ],
            messages=[
                {"role": "user", "content": "Hello"},
                {"role": "user", "content": "there"},
                {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
                {"role": "assistant", "content": "Hm."},
                {"role": "system", "content": "Three."},
                {"role": "user", "content": [{"type": "text", "text": "So?"}]},
            ],
        )
        assert prompt_of(llm) == (
            "<|im_start|>system\nOne.\nTwo.<|im_end|>\n"
            "<|im_start|>user\nHello\nthere<|im_end|>\n"
            "<|im_start|>assistant\nHm.<|im_end|>\n"
            "<|im_start|>system\nThree.<|im_end|>\n"
            "<|im_start|>user\nSo?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_results_come_before_what_is_said_of_them(
        self, client: TestClient, llm: FakeLLM
    ) -> None:
        other = {**USE, "id": "call_2"}
        empty = {"type": "tool_result", "tool_use_id": "call_2", "is_error": True}
        said = {"type": "text", "text": "Well?"}
        ask(
            client,
            tools=[TOOL],
            tool_choice={"type": "none"},
            messages=[
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": [USE, other]},
                {"role": "user", "content": [RESULT, empty, said]},
            ],
        )
        assert prompt_of(llm) == (
            "<|im_start|>user\nLook.<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|>\n"
            "<|im_start|>tool\nwet<|im_end|>\n"
            "<|im_start|>tool\n<|im_end|>\n"
            "<|im_start|>user\nWell?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_a_message_to_go_on_with(self, client: TestClient, llm: FakeLLM) -> None:
        ask(client, messages=[*HI, {"role": "assistant", "content": "Once"}])
        assert prompt_of(llm).endswith("<|im_start|>assistant\nOnce")

    @pytest.mark.parametrize(
        ("messages", "says"),
        [
            ([], "messages: must not be empty"),
            ([{"role": "tool", "content": "x"}], "messages.0.role"),
            ([{"role": "user"}], "messages.0.content"),
            ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "'image' is not"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
            ([{"role": "user", "content": [{}]}], "messages.0.content.0.type"),
            ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
            ([{"role": "user", "content": [USE]}], "'user' has no 'tool_use'"),
            ([{"role": "assistant", "content": [RESULT]}], "'assistant' has no 'tool_result'"),
            ([{"role": "system", "content": [RESULT]}], "'system' has no 'tool_result'"),
            ([*HI, {"role": "assistant", "content": [USE]}], "tool_result has to follow"),
            (
                [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}],
                "messages.0.content.0.content.0: 'image' is not",
            ),
            ([{"role": "assistant", "content": [{**USE, "input": "{}"}]}], "content.0.input"),
        ],
    )
    def test_refused(self, client: TestClient, messages: Any, says: str) -> None:
        assert says in refused(client, messages=messages)
        error = error_of(client.post(COUNT, json={"messages": messages}), 400)
        assert says in error["message"]

    def test_turns_are_put_together_in_linear_time(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm))
        start = time.process_time()
        refused(client, messages=[{"role": "user", "content": "far " * 120}] * (MAX_PIECES - 1))
        assert time.process_time() - start < 5

    def test_too_many_pieces(self, client: TestClient) -> None:
        result = {**RESULT, "content": [{"type": "text", "text": "x"}] * 8}
        many: list[Any] = [
            HI * (MAX_PIECES + 1),
            [{"role": "user", "content": [result] * 1000}] * 2,
        ]
        for messages in many:
            says = refused(client, messages=messages)
            assert f"{MAX_PIECES} messages and content blocks" in says


class TestOptions:
    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            ("max_tokens", 0, "max_tokens: Input should be greater than or equal to 1"),
            ("max_tokens", None, "max_tokens"),
            ("max_tokens", 10**30, "max_tokens"),
            ("temperature", -1, "temperature"),
            ("top_p", 0, "top_p"),
            ("top_k", -2, "top_k"),
            ("stop_sequences", [""], "stop_sequences.0"),
            ("stop_sequences", ["x"] * 99, "stop strings, got 99"),
            ("system", 5, "system"),
            ("system", [{"type": "image"}], "system.0: 'image' is not"),
            ("tools", [{"name": "x"}], "tools.0.input_schema"),
            ("tools", [{**TOOL, "name": "a b"}], "tools.0.name"),
            ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "tools.0"),
            ("tool_choice", {"type": "tool"}, "tool_choice.name: must be the tool"),
            ("tool_choice", "auto", "tool_choice"),
            ("thinking", {"type": "hard"}, "thinking.type"),
            ("output_format", {"type": "json_schema"}, "output_format.schema"),
            ("mcp_servers", [{"url": "http://x"}], "mcp_servers: not supported"),
            ("container", "c", "container: not supported"),
            ("chat_template_kwargs", {"messages": []}, "must not have 'messages'"),
        ],
    )
    def test_refused(self, client: TestClient, field: str, value: Any, says: str) -> None:
        assert says in refused(client, **{field: value})

    def test_a_form_that_cannot_be_enforced(self, client: TestClient) -> None:
        form = {"type": "json_schema", "schema": {"not": {"type": "string"}}}
        assert refused(client, output_format=form).startswith("output_format: ")
        says = refused(client, output_config={"format": form})
        assert says.startswith("output_config.format: ")
        assert "not" in says

    def test_a_server_tool_is_named(self, client: TestClient) -> None:
        tool = {**TOOL, "type": "bash_20250124"}
        assert "tools.0.type: not supported: a tool is a function" in refused(client, tools=[tool])

    def test_a_thread(self, client: TestClient) -> None:
        """By the code the client knows that it has to send the whole conversation."""
        for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
            body = {"max_tokens": 4, "messages": HI, "thread": thread}
            error: Any = error_of(client.post(PATH, json=body), 400)
            assert error["details"] == {"error_code": "thread_unsupported_request"}

    def test_sampling(self, client: TestClient, llm: FakeLLM) -> None:
        ask(client, temperature=0.25, top_p=0.5, top_k=3)
        params = llm.submitted[-1][0].params
        assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 3)


class TestErrors:
    def test_no_such_model(self, client: TestClient) -> None:
        body = {"model": "claude", "max_tokens": 4, "messages": HI}
        for path in (PATH, COUNT):
            error = error_of(client.post(path, json=body), 404)
            assert error["type"] == "not_found_error"
            assert "`claude`" in error["message"]

    def test_keys(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, api_key=["sk-one", "sk-two"]))
        body = {"max_tokens": 4, "messages": HI}
        assert error_of(client.post(PATH, json=body), 401)["type"] == "authentication_error"
        for headers in (
            {"x-api-key": "sk-three"},
            {"x-api-key": ""},
            {"authorization": "Basic sk-one"},
        ):
            error_of(client.post(PATH, json=body, headers=headers), 401)
        for headers in (
            {"x-api-key": "sk-two"},
            {"authorization": "Bearer sk-one"},
            {"x-api-key": "sk-one", "authorization": "Bearer wrong"},
        ):
            assert client.post(PATH, json=body, headers=headers).status_code == 200

    def test_too_large(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, max_body_size=1000))
        body = {"max_tokens": 4, "messages": [{"role": "user", "content": "x" * 1000}]}
        assert error_of(client.post(PATH, json=body), 413)["type"] == "request_too_large"

    def test_overloaded(self, client: TestClient, llm: FakeLLM) -> None:
        llm.overloaded = True
        for streams in (False, True):
            body = {"max_tokens": 4, "messages": HI, "stream": streams}
            response = client.post(PATH, json=body)
            assert error_of(response, 503)["type"] == "overloaded_error"
            assert int(response.headers["retry-after"]) >= 1

    def test_a_dead_engine(self, client: TestClient, llm: FakeLLM) -> None:
        llm.failure, llm.fail_after = EngineDeadError("gone"), 0
        for streams in (False, True):
            body = {"max_tokens": 4, "messages": HI, "stream": streams}
            error_of(client.post(PATH, json=body), 503)

    def test_a_failure_of_ours(self, client: TestClient, llm: FakeLLM) -> None:
        llm.failure, llm.fail_after = "broken at 0x7f00", 0
        error = error_of(client.post(PATH, json={"max_tokens": 4, "messages": HI}), 500)
        assert error["type"] == "api_error"
        assert "0x" not in error["message"]

    def test_not_json(self, client: TestClient) -> None:
        headers = {"content-type": "application/json"}
        assert "JSON" in error_of(client.post(PATH, content=b"{", headers=headers), 400)["message"]
        error_of(client.post(PATH, content=b"[" * 9999, headers=headers), 400)

    def test_other_methods_and_paths(self, client: TestClient) -> None:
        response = client.get(PATH)
        error_of(response, 405)
        assert response.headers["allow"] == "POST"
        error_of(client.post(f"{PATH}/batches", json={}), 404)
