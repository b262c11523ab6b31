"""Calls and thoughts in `/v1/chat/completions`, over a model that says what it is told to."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.fake_llm import DEMO_MODEL, FakeLLM
from tests.server_client import CHAT, HI, build, post, refused, stream

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
TALKS_AND_CALLS = f"Let me see.\n{CALL}\n{OTHER_CALL}"
THINKS = "<think>\nWhat now?\n</think>\n\nNothing."
TOOLS: dict[str, Any] = {"messages": HI, "tools": [WEATHER, CLOCK]}


def says(reply: str, template: str = "qwen3", **options: Any) -> tuple[TestClient, FakeLLM]:
    """A server of a model with a real chat template."""
    llm = FakeLLM(reply, max_model_len=4096)
    assert llm.tokenizer is not None
    path = TEMPLATES / f"{template}.jinja"
    if path.is_file():
        llm.tokenizer.chat_templates["default"] = path.read_text(encoding="utf-8")
    return TestClient(build(llm, **options)), llm


def test_a_stop_string_within_a_call() -> None:
    """It cuts the call short, and the model has not ended the message itself."""
    client, _ = says(CALL)
    for stop, reason in (("Par", "stop"), ("</tool", "tool_calls")):
        (choice,) = post(client, CHAT, **TOOLS, stop=[stop])["choices"]
        assert choice["finish_reason"] == reason
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def message_of(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """What the chunks of a choice add up to, as OpenAI's client adds them."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            message["finish_reason"] = choice["finish_reason"]
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
                    continue
                for part in value:
                    calls = message.setdefault("tool_calls", [])
                    if part["index"] == len(calls):
                        assert set(part) == {"index", "id", "type", "function"}
                        assert set(part["function"]) == {"name", "arguments"}
                        calls.append({"name": part["function"]["name"], "arguments": ""})
                    else:
                        assert part["index"] == len(calls) - 1
                        assert set(part) == {"index", "function"}
                        assert set(part["function"]) == {"arguments"}
                    calls[-1]["arguments"] += part["function"]["arguments"]
    return message


class TestCalls:
    def test_a_whole_answer(self) -> None:
        client, _ = says(TALKS_AND_CALLS)
        (choice,) = post(client, CHAT, **TOOLS)["choices"]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message["content"] == "Let me see."
        first, second = message["tool_calls"]
        assert first["type"] == second["type"] == "function"
        assert first["function"]["name"] == "weather"
        assert json.loads(first["function"]["arguments"]) == {"city": "Paris"}
        assert second["function"]["name"] == "clock"
        assert json.loads(second["function"]["arguments"]) == {}
        assert first["id"] != second["id"]
        assert first["id"].startswith("call_")

    def test_a_stream_says_the_same(self) -> None:
        client, _ = says(TALKS_AND_CALLS)
        chunks = stream(client, CHAT, **TOOLS)
        message = message_of(chunks)
        whole = post(client, CHAT, **TOOLS)["choices"][0]["message"]
        assert message["content"] == whole["content"]
        assert message["tool_calls"] == [call["function"] for call in whole["tool_calls"]]
        assert message["finish_reason"] == "tool_calls"
        assert message["role"] == "assistant"

    def test_arguments_come_as_they_are_written(self) -> None:
        client, _ = says(CALL)
        deltas = [c["choices"][0]["delta"] for c in stream(client, CHAT, **TOOLS)]
        assert sum("tool_calls" in delta for delta in deltas) > 2

    def test_a_message_of_calls_alone_has_no_content(self) -> None:
        client, _ = says(CALL)
        message = post(client, CHAT, **TOOLS)["choices"][0]["message"]
        assert message["content"] is None
        assert len(message["tool_calls"]) == 1

    @pytest.mark.parametrize("body", [{"messages": HI}, {**TOOLS, "tool_choice": "none"}])
    def test_nothing_is_a_call_where_there_is_none(self, body: dict[str, Any]) -> None:
        client, _ = says(TALKS_AND_CALLS)
        choice = post(client, CHAT, **body)["choices"][0]
        assert choice["message"]["content"] == TALKS_AND_CALLS
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        assert message_of(stream(client, CHAT, **body))["content"] == TALKS_AND_CALLS

    def test_what_is_no_call_is_text(self) -> None:
        broken = '<tool_call>\n{"nome": "weather"}\n</tool_call>'
        client, _ = says(broken)
        choice = post(client, CHAT, **TOOLS)["choices"][0]
        assert "nome" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"

    def test_a_call_that_is_cut_short(self) -> None:
        client, llm = says(CALL)
        length = len(llm.reply_ids) - 10
        choice = post(client, CHAT, **TOOLS, max_tokens=length)["choices"][0]
        assert choice["finish_reason"] == "length"
        call = choice["message"]["tool_calls"][0]["function"]
        assert call["name"] == "weather"
        assert '{"city": "Paris"}'.startswith(call["arguments"])

    def test_a_call_that_must_be_made_and_does_not_begin_in_time(self) -> None:
        client, _ = says(CALL)
        body = {**TOOLS, "tool_choice": "required", "max_tokens": 3}
        choice = post(client, CHAT, **body)["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert message_of(stream(client, CHAT, **body))["content"] == ""

    def test_arguments_in_tags_have_the_types_of_the_tool(self) -> None:
        typed = {"type": "object", "properties": {"code": {"type": "string"}, "n": {}}}
        tool = {"function": {"name": "run", "parameters": typed}}
        client, _ = says(
            "<tool_call>\n<function=run>\n<parameter=code>\n1\n</parameter>\n"
            "<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
            "qwen3-coder",
        )
        message = post(client, CHAT, messages=HI, tools=[tool])["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"code": "1", "n": 1}

    def test_several_choices(self) -> None:
        client, _ = says(CALL)
        chunks = stream(client, CHAT, **TOOLS, n=2)
        assert message_of(chunks, 0)["tool_calls"] == message_of(chunks, 1)["tool_calls"]
        choices = post(client, CHAT, **TOOLS, n=2)["choices"]
        ids = {call["id"] for choice in choices for call in choice["message"]["tool_calls"]}
        assert len(ids) == 2

    def test_tokens_and_log_probabilities_are_all_told(self) -> None:
        client, llm = says(TALKS_AND_CALLS)
        body = {**TOOLS, "logprobs": True, "return_token_ids": True}
        chunks = [c["choices"][0] for c in stream(client, CHAT, **body)]
        streamed = [i for chunk in chunks for i in chunk.get("token_ids", [])]
        told = [e for chunk in chunks if chunk["logprobs"] for e in chunk["logprobs"]["content"]]
        whole = post(client, CHAT, **body)["choices"][0]
        assert streamed == whole["token_ids"]
        assert streamed[:-1] == llm.reply_ids
        assert len(told) == len(whole["logprobs"]["content"]) == len(streamed)

    def test_the_model_hears_of_tools_without_strict(self) -> None:
        client, llm = says("Hi", "qwen2.5")
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
        post(client, CHAT, messages=HI, tools=[strict])
        prompt = llm.submitted[0][0].prompt or ""
        assert '"weather"' in prompt
        assert "strict" not in prompt

    @pytest.mark.parametrize(
        ("template", "reply"),
        [
            ("qwen2.5", CALL),
            ("llama-3.1", '{"name": "weather", "parameters": {"city": "Paris"}}'),
        ],
    )
    def test_each_model_has_its_way(self, template: str, reply: str) -> None:
        client, llm = says(reply, template)
        message = post(client, CHAT, **TOOLS)["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        back = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
        post(client, CHAT, messages=[*HI, message, back], tools=[WEATHER])
        assert "sunny" in (llm.submitted[-1][0].prompt or "")

    def test_mistral_counts_the_letters_of_an_id(self) -> None:
        reply = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]'
        client, _ = says(reply, "mistral", tool_call_parser="mistral")
        (call,) = post(client, CHAT, **TOOLS)["choices"][0]["message"]["tool_calls"]
        assert len(call["id"]) == 9
        assert call["id"].isalnum()

    def test_a_template_without_tools_is_told_of_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        client, llm = says("Hi")
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = "{{ messages[0].content }} told once"
        for _ in range(2):
            post(client, CHAT, **TOOLS)
        assert caplog.text.count("does not show tools") == 1

    def test_a_mark_that_is_a_special_token(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in DEMO_MODEL.glob("*.json"):
            text = path.read_text(encoding="utf-8").replace("<|im_start|>", "[TOOL_CALLS]")
            (tmp_path / path.name).write_text(text, encoding="utf-8")
        monkeypatch.setattr("tests.fake_llm.DEMO_MODEL", tmp_path)
        client, llm = says('Hm.[TOOL_CALLS][{"name": "clock", "arguments": {}}]', "mistral")
        for body in (TOOLS, {**TOOLS, "tool_choice": "required"}):
            message = post(client, CHAT, **body)["choices"][0]["message"]
            assert message["content"] == (None if "tool_choice" in body else "Hm.")
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]
        message = post(client, CHAT, messages=HI)["choices"][0]["message"]
        assert "[TOOL_CALLS]" not in message["content"]
        assert [params.skip_special_tokens for params in llm.asked] == [False, False, True]

    def test_the_parser_may_be_named(self) -> None:
        client, _ = says('{"name": "clock", "parameters": {}}', tool_call_parser="llama3_json")
        choice = post(client, CHAT, **TOOLS)["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "clock"


class TestChoice:
    @pytest.mark.parametrize(
        "choice",
        [
            "required",
            NAMED,
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
        ],
    )
    def test_a_call_that_has_to_be(self, choice: Any) -> None:
        client, llm = says(OTHER_CALL)
        answer = post(client, CHAT, **TOOLS, tool_choice=choice)["choices"][0]
        assert answer["message"]["tool_calls"][0]["function"]["name"] == "clock"
        form = llm.asked[0].structured_outputs
        assert form is not None
        assert "clock" in str(form)
        assert ("weather" in str(form)) == (choice == "required")

    def test_a_call_that_may_be(self) -> None:
        client, llm = says("Hi")
        post(client, CHAT, **TOOLS)
        post(client, CHAT, **TOOLS, tool_choice="auto", parallel_tool_calls=True)
        assert all(item.payload.grammar is None for item, _, _ in llm.submitted)

    def test_a_strict_call_that_may_be(self) -> None:
        client, llm = says("Hi")
        strict = {"type": "function", "function": {**CLOCK["function"], "strict": True}}  # type: ignore[dict-item]
        post(client, CHAT, messages=HI, tools=[strict])
        assert llm.asked[0].structured_outputs is not None

    def test_allowed_tools_are_all_that_the_model_hears_of(self) -> None:
        client, llm = says("Hi", "qwen2.5")
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
        post(client, CHAT, **TOOLS, tool_choice=allowed)
        prompt = llm.submitted[0][0].prompt or ""
        assert '"clock"' in prompt
        assert '"weather"' not in prompt

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": NAMED}, "tool_choice"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
            ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
            ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
            ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
            (
                {
                    "tools": [WEATHER],
                    "tool_choice": {
                        "type": "allowed_tools",
                        "allowed_tools": {"mode": "auto", "tools": [NAMED]},
                    },
                },
                "tool_choice.allowed_tools.tools.0.function.name",
            ),
            ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
                "tools.0.function.parameters",
            ),
            ({"tools": [CLOCK] * 129}, "tools"),
        ],
    )
    def test_refused_by_name(self, body: dict[str, Any], param: str) -> None:
        client, _ = says("Hi")
        error = refused(client, CHAT, messages=HI, **body)
        assert error["param"] == param

    def test_schemas_too_large_for_a_grammar(self) -> None:
        client, _ = says("Hi")
        large = {f"p{i}": {"type": "string", "description": "x" * 20} for i in range(500)}
        parameters = {"type": "object", "properties": large}
        tools = [
            {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}}
            for i in range(100)
        ]
        error = refused(client, CHAT, messages=HI, tools=tools, tool_choice="required")
        assert error["param"] == "tools"
        assert "characters, more than" in error["message"]

    def test_a_schema_that_cannot_be_enforced(self) -> None:
        client, _ = says("Hi")
        bad = {"name": "f", "parameters": {"type": "object", "not": {"required": ["a"]}}}
        tools = [{"type": "function", "function": bad}]
        error = refused(client, CHAT, messages=HI, tools=tools, tool_choice="required")
        assert error["param"] == "tools"
        assert "not" in error["message"]

    @pytest.mark.parametrize("kind", [None, 5, True, "an object", ["string"], {}])
    @pytest.mark.parametrize("template", ["qwen2.5", "qwen3-coder", "llama-pythonic"])
    def test_a_schema_of_something_else(self, template: str, kind: Any) -> None:
        client, _ = says("Hi", template)
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}]
        error = refused(client, CHAT, messages=HI, tools=tools, tool_choice="required")
        assert error["param"] == "tools"
        assert error["message"].startswith("f: 'parameters' must be a schema of type 'object'")

    @pytest.mark.parametrize("choices", [5, [5], [None], {}])
    def test_text_of_which_the_choices_are_none(self, choices: Any) -> None:
        client, _ = says("Hi", "qwen3-coder")
        text = {"type": "string", "enum": choices}
        parameters = {"type": "object", "properties": {"a": text}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        error = refused(client, CHAT, messages=HI, tools=tools, tool_choice="required")
        assert error["param"] == "tools"


class TestThoughts:
    def test_a_whole_answer(self) -> None:
        client, _ = says(THINKS)
        body = post(client, CHAT, messages=HI)
        message = body["choices"][0]["message"]
        assert message["content"] == "Nothing."
        assert message["reasoning_content"] == message["reasoning"] == "What now?"
        details = body["usage"]["completion_tokens_details"]
        assert 0 < details["reasoning_tokens"] < body["usage"]["completion_tokens"]

    def test_a_stream_says_the_same(self) -> None:
        client, _ = says(THINKS)
        chunks = stream(client, CHAT, messages=HI, stream_options={"include_usage": True})
        message = message_of(chunks[:-1])
        assert message["content"] == "Nothing."
        assert message["reasoning_content"] == message["reasoning"] == "What now?"
        whole = post(client, CHAT, messages=HI)["usage"]["completion_tokens_details"]
        assert chunks[-1]["usage"]["completion_tokens_details"] == whole

    def test_they_may_be_left_out(self) -> None:
        client, _ = says(THINKS)
        body = {"messages": HI, "include_reasoning": False}
        message = post(client, CHAT, **body)["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Nothing.", "refusal": None}
        streamed = message_of(stream(client, CHAT, **body))
        assert streamed == {"role": "assistant", "content": "Nothing.", "finish_reason": "stop"}

    def test_they_may_be_all_there_is_room_for(self) -> None:
        client, _ = says(THINKS)
        body = post(client, CHAT, messages=HI, max_tokens=6)
        choice = body["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert "What now?".startswith(choice["message"]["reasoning_content"])

    def test_a_model_that_does_not_think_is_left_alone(self) -> None:
        client, _ = says(THINKS, "chatml")
        body = post(client, CHAT, messages=HI)
        assert body["choices"][0]["message"]["content"] == THINKS
        assert "completion_tokens_details" not in body["usage"]

    def test_before_a_call(self) -> None:
        client, _ = says(f"<think>\nWhat now?\n</think>\n\n{CALL}")
        for message in (
            post(client, CHAT, **TOOLS)["choices"][0]["message"],
            message_of(stream(client, CHAT, **TOOLS)),
        ):
            assert message["reasoning_content"] == "What now?"
            assert len(message["tool_calls"]) == 1
            assert not message["content"]

    def test_before_a_form(self) -> None:
        client, llm = says('<think>\nHm\n</think>\n\n{"a": 1}')
        body = {"messages": HI, "response_format": {"type": "json_object"}}
        message = post(client, CHAT, **body)["choices"][0]["message"]
        assert json.loads(message["content"]) == {"a": 1}
        form = llm.asked[0].structured_outputs
        assert form is not None
        assert "think" in str(form)
        for off in (
            {"reasoning_effort": "none"},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ):
            post(client, CHAT, **body, **off)
            form = llm.asked[-1].structured_outputs
            assert form is not None
            assert form.json_object

    def test_the_parser_may_be_named(self) -> None:
        client, _ = says("Hm\n</think>\n\nYes.", "chatml", reasoning_parser="deepseek_r1")
        message = post(client, CHAT, messages=HI)["choices"][0]["message"]
        assert message["reasoning_content"] == "Hm"
        assert message["content"] == "Yes."
