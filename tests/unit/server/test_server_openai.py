"""`/v1/chat/completions` and `/v1/models`, over a model that says what it is told to."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.fake_llm import EOS, OTHER, FakeLLM
from tests.server_client import CHAT, HI, TEXT, build, post, refused, stream


class TestChat:
    def test_a_whole_answer(self, client: TestClient) -> None:
        body = post(client, CHAT, messages=HI)
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["model"] == "demo_model"
        (choice,) = body["choices"]
        assert choice["message"] == {
            "role": "assistant",
            "content": " upon a time",
            "refusal": None,
        }
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert body["usage"] == {
            "prompt_tokens": 13,
            "completion_tokens": 4,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 2},
        }

    def test_a_stream_says_the_same(self, client: TestClient) -> None:
        chunks = stream(client, CHAT, messages=HI, stream_options={"include_usage": True})
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        *deltas, last, usage = chunks
        assert deltas[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"]["content"] for c in deltas) == " upon a time"
        assert {c["choices"][0]["finish_reason"] for c in deltas} == {None}
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["finish_reason"] == "stop"
        assert usage["choices"] == []
        assert usage["usage"] == post(client, CHAT, messages=HI)["usage"]
        assert {chunk["usage"] for chunk in (*deltas, last)} == {None}

    def test_usage_only_if_asked_for(self, client: TestClient) -> None:
        chunks = stream(client, CHAT, messages=HI)
        assert all("usage" not in chunk for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    def test_usage_in_every_chunk(self, client: TestClient) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = stream(client, CHAT, messages=HI, stream_options=options)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 4

    def test_choices_of_a_stream_are_told_apart(self, client: TestClient) -> None:
        chunks = stream(client, CHAT, messages=HI, n=3)
        texts = dict.fromkeys(range(3), "")
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == dict.fromkeys(range(3), " upon a time")
        ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
        assert sorted(ends) == [0, 1, 2]

    def test_length_ends_it(self, client: TestClient) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            choice = post(client, CHAT, messages=HI, **{name: 2})["choices"][0]
            assert choice["message"]["content"] == " upon a"
            assert choice["finish_reason"] == "length"

    def test_a_stop_string_ends_it(self, client: TestClient) -> None:
        choice = post(client, CHAT, messages=HI, stop=["ti", "x"])["choices"][0]
        assert choice["message"]["content"] == " upon a "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "ti")

    def test_what_could_be_a_stop_string_is_held_back(self, client: TestClient) -> None:
        chunks = stream(client, CHAT, messages=HI, stop="a tim!")
        texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        assert [text for text in texts if text] == [" upon", " ", "a time"]

    @pytest.mark.parametrize("streams", [False, True])
    def test_logprobs(self, client: TestClient, streams: bool) -> None:
        body = {"messages": HI, "logprobs": True, "top_logprobs": 1}
        if streams:
            choices = [c["choices"][0]["logprobs"] for c in stream(client, CHAT, **body)]
            content = [entry for c in choices if c for entry in c["content"]]
        else:
            content = post(client, CHAT, **body)["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content[:3]] == [" upon", " a", " time"]
        assert len(content) == 4  # the token that ends the text is one
        assert bytes(content[0]["bytes"]) == b" upon"
        assert content[0]["logprob"] == -1.0
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5]

    def test_logprobs_without_alternatives(self, client: TestClient) -> None:
        choice = post(client, CHAT, messages=HI, logprobs=True)["choices"][0]
        assert choice["logprobs"]["content"][0]["top_logprobs"] == []

    def test_bytes_of_half_characters(self) -> None:
        llm = FakeLLM(reply="é😀")
        body = post(TestClient(build(llm)), CHAT, messages=HI, logprobs=True)
        content = body["choices"][0]["logprobs"]["content"][:-1]
        assert bytes(byte for entry in content for byte in entry["bytes"]) == "é😀".encode()

    def test_token_ids(self, client: TestClient, llm: FakeLLM) -> None:
        body = post(client, CHAT, messages=HI, return_token_ids=True)
        assert body["choices"][0]["token_ids"] == [*llm.reply_ids, EOS]
        assert len(body["prompt_token_ids"]) == 13

    def test_prompt_logprobs(self, client: TestClient) -> None:
        body = post(client, CHAT, messages=HI, prompt_logprobs=1)
        assert body["prompt_logprobs"][0] is None
        assert body["prompt_logprobs"][1][str(OTHER)] == {
            "logprob": -0.5,
            "rank": 1,
            "decoded_token": "per",
        }

    def test_parts_of_text(self, client: TestClient, llm: FakeLLM) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        post(client, CHAT, messages=[{"role": "developer", "content": parts}])
        assert llm.submitted[0][0].prompt == (
            "<|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_text_under_other_names(self, client: TestClient, llm: FakeLLM) -> None:
        parts = [
            "one",
            {"type": "input_text", "text": "two"},
            {"type": "output_text", "text": "three"},
            {"type": "refusal", "refusal": "four"},
        ]
        post(client, CHAT, messages=[{"role": "assistant", "content": parts}])
        assert "one\ntwo\nthree\nfour<|im_end|>" in (llm.submitted[0][0].prompt or "")
        image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        error = refused(client, CHAT, messages=[{"role": "user", "content": image}])
        assert "'image_url' is not supported: this model reads" in error["message"]

    def test_a_continued_message(self, client: TestClient, llm: FakeLLM) -> None:
        messages = [*HI, {"role": "assistant", "content": "Once"}]
        body = {"messages": messages, "continue_final_message": True, "echo": True}
        content = post(client, CHAT, **body)["choices"][0]["message"]["content"]
        assert content == "Once upon a time"
        prompt = llm.submitted[0][0].prompt
        assert prompt is not None
        assert prompt.endswith("assistant\nOnce")
        chunks = stream(client, CHAT, **body)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == content

    def test_history_with_tools(self, client: TestClient, llm: FakeLLM) -> None:
        template = "{{ messages | tojson }}{{ tools | tojson }}"
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = template
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        messages = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
        post(client, CHAT, messages=messages, tools=[tool], tool_choice="none")
        prompt = llm.submitted[0][0].prompt or ""
        decoder = json.JSONDecoder()
        rendered, end = decoder.raw_decode(prompt)
        assert rendered[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert rendered[2] == {"role": "tool", "content": "2", "tool_call_id": "1"}
        assert decoder.raw_decode(prompt[end:])[0] == [tool]

    @pytest.mark.parametrize("roles", [["system"] * 3, ["system", "developer", "developer"]])
    def test_what_the_system_says_first_is_one_message(
        self, client: TestClient, llm: FakeLLM, roles: list[str]
    ) -> None:
        """Codex sends instructions and a message of the developer; many templates take but one."""
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = (
            "{% for message in messages[1:] if message.role == 'system' %}"
            "{{ raise_exception('System message must be at the beginning.') }}{% endfor %}"
            "{{ messages | tojson }}"
        )
        first = [{"role": role, "content": text} for role, text in zip(roles, "abc", strict=True)]
        post(client, CHAT, messages=[*first, *HI])
        assert json.loads(llm.submitted[-1][0].prompt or "") == [
            {"role": "system", "content": "a\nb\nc"},
            *HI,
        ]
        post(client, "/v1/responses", instructions="a", input=[*first[1:], *HI])
        assert llm.submitted[-1][0].prompt == llm.submitted[0][0].prompt
        llm.tokenizer.chat_templates["default"] = "{{ messages | tojson }}{# developer #}"
        post(client, CHAT, messages=[*first, *HI, *first])
        rendered = json.loads(llm.submitted[-1][0].prompt or "")
        assert [item["role"] for item in rendered] == [*dict.fromkeys(roles), "user", *roles]

    def test_template_variables(self, llm: FakeLLM) -> None:
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = (
            "{{ enable_thinking }} {{ reasoning_effort }} {{ date_string }}"
        )
        defaults = '{"enable_thinking": true, "date_string": "today"}'
        client = TestClient(build(llm, default_chat_template_kwargs=defaults))
        post(client, CHAT, messages=HI, reasoning_effort="none")
        post(client, CHAT, messages=HI, chat_template_kwargs={"enable_thinking": 1})
        prompts = [item.prompt for item, _, _ in llm.submitted]
        assert prompts == ["False none today", "1  today"]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"messages": [{"role": "narrator", "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"content": "x"}]}, "messages.0.role"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages.0.content.0.type",
            ),
            ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"functions": []}, "functions"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"modalities": ["text", "audio"]}, "modalities"),
            ({"audio": {"voice": "x"}}, "audio"),
            ({"web_search_options": {}}, "web_search_options"),
            ({"chat_template": "{{ 1 }}"}, "chat_template"),
            ({"logits_processors": ["x"]}, "logits_processors"),
            ({"use_beam_search": True}, "use_beam_search"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
            (
                {"continue_final_message": True, "add_generation_prompt": True},
                "continue_final_message",
            ),
            (
                {
                    "messages": [
                        {
                            "role": "assistant",
                            "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                        }
                    ]
                },
                "messages.0.tool_calls.0.function.arguments",
            ),
        ],
    )
    def test_refused_by_name(self, client: TestClient, body: dict[str, Any], param: str) -> None:
        error = refused(client, CHAT, **{"messages": HI, **body})
        assert error["param"] == param
        assert param.rsplit(".", 1)[-1] in error["message"]

    def test_harmless_fields(self, client: TestClient) -> None:
        post(
            client,
            CHAT,
            messages=[{"role": "user", "content": "Hi", "name": "Ann"}],
            user="ann",
            metadata={"a": "b"},
            service_tier="auto",
            store=True,
            prediction={"type": "content", "content": "Hi"},
            parallel_tool_calls=True,
            safety_identifier="x",
            prompt_cache_key="y",
            response_format={"type": "text"},
            modalities=["text"],
            tools=[],
            tool_choice="auto",
            stop=None,
            temperature=None,
            stream_options=None,
            who_knows=1,
        )


class TestModels:
    def test_names(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, served_model_name=["small", "org/alias"]))
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["small", "org/alias"]
        assert listed["data"][0]["max_model_len"] == 256
        assert client.get("/v1/models/org/alias").json() == listed["data"][1]
        response = client.get("/v1/models/other")
        assert response.status_code == 404
        assert "`small`, `org/alias`" in response.json()["error"]["message"]
        assert client.get("/v1").json() == {"status": "ok"}
        assert post(client, TEXT, prompt="a", model="org/alias")["model"] == "small"


def test_the_schema_names_what_is_refused(llm: FakeLLM) -> None:
    schema = build(llm).openapi()
    properties = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert properties["suffix"]["type"] == "null"
    content = schema["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert {"400", "401", "404", "413", "500", "503"} <= set(
        schema["paths"][CHAT]["post"]["responses"]
    )
