"""`/v1/responses`: answers, their streams, and what is kept of them."""

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanovllm.config import ServerConfig
from nanovllm.server.app import create_app
from tests.fake_llm import FakeLLM
from tests.server_client import build, call, post, refused

RESPONSES = "/v1/responses"


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose lines, numbers and ends are checked."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    return events


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(RESPONSES, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def text_of(response: Any) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


class TestAnswers:
    def test_whole(self, client: TestClient) -> None:
        response = post(client, RESPONSES, input="Hi", metadata={"a": "b"})
        assert response["object"] == "response"
        assert response["id"].startswith("resp_")
        assert response["status"] == "completed"
        assert response["completed_at"] >= response["created_at"]
        assert response["model"] == "demo_model"
        assert response["metadata"] == {"a": "b"}
        assert (response["error"], response["incomplete_details"]) == (None, None)
        assert text_of(response) == " upon a time"
        assert response["usage"] == {
            "input_tokens": 13,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 17,
        }

    def test_streamed(self, client: TestClient) -> None:
        events = stream(client, input="Hi")
        assert [event["type"].removeprefix("response.") for event in events] == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            *["output_text.delta"] * 3,
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        first, last = events[0]["response"], events[-1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert (last["status"], text_of(last)) == ("completed", " upon a time")
        assert last["output"] == [events[-2]["item"]]
        assert last["usage"]["output_tokens"] == 4

    def test_cut_off(self, client: TestClient) -> None:
        response = post(client, RESPONSES, input="Hi", max_output_tokens=2)
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["completed_at"] is None
        assert response["output"][0]["status"] == "incomplete"
        assert text_of(response) == " upon a"
        last = stream(client, input="Hi", max_output_tokens=2)[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["status"] == "incomplete"

    def test_what_was_asked_comes_back(self, client: TestClient) -> None:
        tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
        response = post(
            client,
            RESPONSES,
            input="Hi",
            instructions="Be brief.",
            tools=[tool],
            tool_choice="none",
            parallel_tool_calls=False,
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=9,
            reasoning={"effort": "low"},
            text={"verbosity": "low"},
            user="ann",
            store=False,
        )
        assert response["instructions"] == "Be brief."
        assert response["tools"] == [tool | {"description": None, "strict": True}]
        assert response["tool_choice"] == "none"
        assert response["parallel_tool_calls"] is False
        assert (response["temperature"], response["top_p"]) == (0.5, 0.9)
        assert response["max_output_tokens"] == 9
        assert response["reasoning"]["effort"] == "low"
        assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
        assert (response["user"], response["store"]) == ("ann", False)

    @pytest.mark.parametrize("streams", [False, True])
    def test_log_probabilities(self, client: TestClient, streams: bool) -> None:
        body = {"input": "Hi", "top_logprobs": 1, "include": ["message.output_text.logprobs"]}
        if streams:
            events = stream(client, **body)
            response = events[-1]["response"]
            deltas = [e for e in events if e["type"] == "response.output_text.delta"]
            streamed = [entry for event in deltas for entry in event["logprobs"]]
            assert streamed == response["output"][0]["content"][0]["logprobs"]
        else:
            response = post(client, RESPONSES, **body)
        logprobs = response["output"][0]["content"][0]["logprobs"]
        assert [entry["token"] for entry in logprobs] == [" upon", " a", " time"]
        assert [top["logprob"] for top in logprobs[0]["top_logprobs"]] == [-0.5]

    def test_log_probabilities_of_a_text_with_a_special_token_in_it(
        self, client: TestClient, llm: FakeLLM
    ) -> None:
        """What the text leaves out is none of its tokens; half a character is held back."""
        first, *rest = llm.frontend.encode("\U0001f600")
        llm.reply_ids = [first, *llm.frontend.encode("<|im_start|>"), *rest]
        include = ["message.output_text.logprobs"]
        response = post(client, RESPONSES, input="Hi", include=include)
        logprobs = response["output"][0]["content"][0]["logprobs"]
        assert [byte for entry in logprobs for byte in entry["bytes"]] == list(
            text_of(response).encode()
        )

    def test_the_prompt(self, client: TestClient, llm: FakeLLM) -> None:
        post(client, RESPONSES, input="Hi", instructions="Be brief.")
        assert llm.submitted[0][0].prompt == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_input_tokens(self, client: TestClient) -> None:
        counted = post(client, RESPONSES + "/input_tokens", input="Hi", instructions="Be brief.")
        response = post(client, RESPONSES, input="Hi", instructions="Be brief.")
        assert counted == {
            "object": "response.input_tokens",
            "input_tokens": response["usage"]["input_tokens"],
        }


CALLS = """<think>
I look.
</think>

One moment.
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>"""
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
UNENFORCEABLE = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


class TestCalls:
    @pytest.fixture
    def llm(self) -> FakeLLM:
        return FakeLLM(reply=CALLS, max_model_len=1024)

    @pytest.fixture
    def client(self, llm: FakeLLM) -> TestClient:
        return TestClient(build(llm, tool_call_parser="hermes", reasoning_parser="qwen3"))

    @pytest.mark.parametrize("streams", [False, True])
    def test_thoughts_a_message_and_calls(self, client: TestClient, streams: bool) -> None:
        body = {"input": "Weather?", "tools": [TOOL]}
        if streams:
            events = stream(client, **body)
            response = events[-1]["response"]
            deltas = ["", ""]
            for event in events:
                if event["type"] == "response.function_call_arguments.delta":
                    deltas[event["output_index"] - 2] += event["delta"]
            assert deltas == [item["arguments"] for item in response["output"][2:]]
        else:
            response = post(client, RESPONSES, **body)
        thought, message, oslo, rome = response["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "I look."}]
        assert message["content"][0]["text"] == "One moment."
        for item, city in ((oslo, "Oslo"), (rome, "Rome")):
            assert (item["type"], item["name"]) == ("function_call", "weather")
            assert json.loads(item["arguments"]) == {"city": city}
        assert oslo["call_id"] != rome["call_id"]
        assert response["status"] == "completed"
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

    def test_going_on_with_the_results(self, client: TestClient, llm: FakeLLM) -> None:
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = "{{ messages | tojson }}"
        first = post(client, RESPONSES, input="Weather?", tools=[TOOL])
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "cold"}
            for item in first["output"]
            if item["type"] == "function_call"
        ]
        conversation = [{"role": "user", "content": "Weather?"}, *first["output"], *results]
        post(client, RESPONSES, input=results, previous_response_id=first["id"])
        post(client, RESPONSES, input=conversation, store=False)
        stored, by_hand = (item.prompt for item, *_ in llm.submitted[1:])
        assert stored == by_hand
        _, said, oslo, rome = json.loads(stored or "")
        assert said["reasoning_content"] == "I look."
        assert said["content"] == "One moment."
        calls = said["tool_calls"]
        assert [item["function"]["arguments"]["city"] for item in calls] == ["Oslo", "Rome"]
        assert [item["id"] for item in calls] == [oslo["tool_call_id"], rome["tool_call_id"]]

    def test_going_on_behind_calls_that_came_without_a_status(
        self, client: TestClient, llm: FakeLLM
    ) -> None:
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = "{{ messages | tojson }}"
        conversation = [
            {"role": "user", "content": "Weather?"},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "cold"},
        ]
        first = post(client, RESPONSES, input=conversation)
        post(client, RESPONSES, input="And?", previous_response_id=first["id"])
        before, after = (json.loads(item.prompt or "") for item, *_ in llm.submitted)
        assert after[:3] == before

    def test_a_call_that_was_cut_off_is_forgotten(self, client: TestClient, llm: FakeLLM) -> None:
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = "{{ messages | tojson }}"
        for limit in range(1, len(llm.reply_ids)):
            first = post(client, RESPONSES, input="?", tools=[TOOL], max_output_tokens=limit)
            assert first["status"] == "incomplete"
            post(client, RESPONSES, input="And?", previous_response_id=first["id"])

    def test_log_probabilities_of_text_behind_a_call(
        self, client: TestClient, llm: FakeLLM
    ) -> None:
        said = 'Wait.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\nDone.'
        llm.reply_ids = llm.frontend.encode(said)
        include = ["message.output_text.logprobs"]
        response = post(client, RESPONSES, input="?", tools=[TOOL], include=include)
        for index, text in ((0, "Wait."), (2, "\nDone.")):
            part = response["output"][index]["content"][0]
            assert part["text"] == text
            written = bytes(byte for entry in part["logprobs"] for byte in entry["bytes"])
            assert text.strip() in written.decode()
            assert len(written) <= len(text) + 1  # the last token may end with a blank
        llm.reply_ids = llm.frontend.encode(said.replace("\nDone.", "Done."))
        response = post(client, RESPONSES, input="?", tools=[TOOL], include=include)
        part = response["output"][2]["content"][0]
        assert part["text"] == "\nDone."
        assert b"Done." in bytes(byte for entry in part["logprobs"] for byte in entry["bytes"])

    @pytest.mark.parametrize("arguments", ['{"city" 1}', '{"city": 01}', '{"city": "\\ud800"}'])
    def test_a_call_that_the_model_got_wrong_is_forgotten(
        self, client: TestClient, llm: FakeLLM, arguments: str
    ) -> None:
        """What is stored cannot be mended: the conversation could not be gone on with for good."""
        assert llm.tokenizer is not None
        llm.tokenizer.chat_templates["default"] = "{{ messages | tojson }}"
        said = f'Well.<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
        llm.reply_ids = llm.frontend.encode(said)
        first = post(client, RESPONSES, input="?", tools=[TOOL | {"strict": False}])
        message, call = first["output"]
        assert (call["arguments"], call["status"]) == (arguments, "incomplete")
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Wrong."}
        asked = {"role": "user", "content": "Again?"}
        post(client, RESPONSES, input=[result, asked], previous_response_id=first["id"])
        expected = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": message["content"][0]["text"]},
            asked,
        ]
        assert json.loads(llm.submitted[-1][0].prompt or "") == expected
        post(client, RESPONSES, input=[expected[0], message, call, result, asked])
        assert json.loads(llm.submitted[-1][0].prompt or "") == expected

    def test_strictness(self, client: TestClient) -> None:
        """Who asks for it gets it or a 400, who says nothing gets what there is of it."""
        tool = TOOL | {"parameters": UNENFORCEABLE}
        post(client, RESPONSES, input="Hi", tools=[tool])
        post(client, RESPONSES, input="Hi", tools=[tool | {"strict": False}])
        for more in ({"tools": [tool | {"strict": True}]}, {"tool_choice": "required"}):
            error = refused(client, RESPONSES, **{"input": "Hi", "tools": [tool], **more})
            assert error["param"] == "tools"
            assert "not" in error["message"]

    def test_a_form_that_cannot_be_enforced(self, client: TestClient) -> None:
        form = {"type": "json_schema", "name": "x", "schema": UNENFORCEABLE}
        error = refused(client, RESPONSES, input="Hi", text={"format": form})
        assert error["param"] == "text.format"
        assert '"not"' in error["message"]


class TestFailures:
    def test_before_the_first_token(self, client: TestClient, llm: FakeLLM) -> None:
        llm.fail_after = 0
        for streams in (False, True):
            response = client.post(RESPONSES, json={"input": "Hi", "stream": streams})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_died"

    def test_after_it(self, client: TestClient, llm: FakeLLM) -> None:
        llm.fail_after = 2
        last = stream(client, input="Hi")[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert "try again" in last["response"]["error"]["message"]
        assert client.get(f"{RESPONSES}/{last['response']['id']}").status_code == 404
        assert llm.num_open == 0

    def test_behind_a_comment(self, llm: FakeLLM) -> None:
        llm.delay, llm.fail_after = 0.1, 0
        app = build(llm, sse_keep_alive_interval=0.05)
        status, answer = asyncio.run(call(app, RESPONSES, {"input": "Hi", "stream": True}))
        assert status == 200
        assert events_of(answer.decode())[-1]["type"] == "response.failed"

    def test_a_full_queue_and_an_unknown_model(self, client: TestClient, llm: FakeLLM) -> None:
        response = client.post(RESPONSES, json={"input": "Hi", "model": "gpt-4"})
        assert response.status_code == 404
        llm.overloaded = True
        assert client.post(RESPONSES, json={"input": "Hi", "stream": True}).status_code == 503

    def test_a_prompt_that_is_too_long(self, client: TestClient) -> None:
        error = refused(client, RESPONSES, input="Hi " * 300)
        assert error["code"] == "context_length_exceeded"

    @pytest.mark.parametrize("streams", [False, True])
    def test_a_client_that_leaves(self, app: FastAPI, llm: FakeLLM, streams: bool) -> None:
        llm.delay = 0.001 if streams else 60
        llm.reply_ids = [686] * 200

        async def run() -> None:
            body = {"input": "Hi", "stream": streams}
            await call(app, RESPONSES, body, lambda got: not streams or got.count(b"event:") > 9)
            assert llm.num_open == 0

        asyncio.run(run())
        assert len(app.state.server.responses) == 0

    def test_abort_by_the_id_of_an_answer(self, app: FastAPI, llm: FakeLLM) -> None:
        """Also where the request has a name of its client's."""
        llm.delay = 0.01
        llm.reply_ids = [686] * 200
        told = asyncio.Event()
        ids: list[str] = []

        def note(sent: bytes) -> bool:
            if not ids and b"event: response.in_progress" in sent:
                ids.append(json.loads(sent.split(b"data: ")[1].splitlines()[0])["response"]["id"])
                told.set()
            return False

        async def run() -> bytes:
            asked = call(app, RESPONSES, {"input": "Hi", "stream": True}, note, request_id="mine")
            answer = asyncio.ensure_future(asked)
            await asyncio.wait_for(told.wait(), 10)
            aborted = await call(app, "/abort", {"request_id": ids[0]})
            assert json.loads(aborted[1])["aborted"]
            return (await answer)[1]

        assert b'"status":"cancelled"' in asyncio.run(run())

    @pytest.mark.parametrize("streams", [False, True])
    def test_abort(self, app: FastAPI, llm: FakeLLM, streams: bool) -> None:
        llm.delay = 0.01
        llm.reply_ids = [686] * 200
        body = {"input": "Hi", "stream": streams}

        async def run() -> bytes:
            answer = asyncio.ensure_future(call(app, RESPONSES, body, request_id="mine"))
            while not llm.num_open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            aborted = await call(app, "/abort", {"request_id": "mine"})
            assert json.loads(aborted[1])["aborted"]
            return (await answer)[1]

        answer = asyncio.run(run())
        response = json.loads(answer) if not streams else events_of(answer.decode())[-1]["response"]
        assert response["status"] == "cancelled"
        assert response["incomplete_details"] is None
        assert response["output"][0]["status"] == "incomplete"

    def test_names_of_requests(self, client: TestClient) -> None:
        """A client names its request, but cannot choose the id that a response is read by."""
        named = client.post(RESPONSES, json={"input": "Hi"}, headers={"X-Request-Id": "mine"})
        assert named.headers["x-request-id"] == "mine"
        assert "mine" not in named.json()["id"]
        unnamed = client.post(RESPONSES, json={"input": "Hi"})
        assert unnamed.headers["x-request-id"] == unnamed.json()["id"]


class TestConversations:
    def test_going_on(self, client: TestClient, llm: FakeLLM) -> None:
        first = post(client, RESPONSES, input="Hi", instructions="Be brief.")
        second = post(client, RESPONSES, input="And?", previous_response_id=first["id"])
        stream(client, input="So?", previous_response_id=second["id"], instructions="Go on.")
        assert second["previous_response_id"] == first["id"]
        turns = ["<|im_start|>user\nHi<|im_end|>", "<|im_start|>assistant\n upon a time<|im_end|>"]
        said = "\n".join([*turns, turns[0].replace("Hi", "And?")])
        assert llm.submitted[1][0].prompt == f"{said}\n<|im_start|>assistant\n"
        assert llm.submitted[2][0].prompt == (
            f"<|im_start|>system\nGo on.<|im_end|>\n{said}\n{turns[1]}\n"
            "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_what_is_not_kept(self, client: TestClient, llm: FakeLLM) -> None:
        response = post(client, RESPONSES, input="Hi", store=False)
        error = refused(client, RESPONSES, input="Hi", previous_response_id=response["id"])
        assert error["param"] == "previous_response_id"
        assert error["code"] == "previous_response_not_found"
        client = TestClient(build(llm, max_stored_bytes=0))
        response = post(client, RESPONSES, input="Hi", store=True)
        assert response["store"] is False
        assert client.get(f"{RESPONSES}/{response['id']}").status_code == 404

    def test_what_is_forgotten_leaves_the_rest(self, llm: FakeLLM) -> None:
        client = TestClient(build(llm, max_stored_bytes=4000))
        first = post(client, RESPONSES, input="Hi")
        second = post(client, RESPONSES, input="And?", previous_response_id=first["id"])
        for _ in range(2):
            last = post(client, RESPONSES, input="x", previous_response_id=second["id"])
        assert client.get(f"{RESPONSES}/{first['id']}").status_code == 404
        post(client, RESPONSES, input="y", previous_response_id=last["id"])
        assert (llm.submitted[-1][0].prompt or "").startswith("<|im_start|>user\nHi<|im_end|>")

    def test_get_and_delete(self, client: TestClient) -> None:
        response = post(client, RESPONSES, input="Hi")
        path = f"{RESPONSES}/{response['id']}"
        assert client.get(path).json() == response
        assert client.get(path, params={"stream": "true"}).status_code == 400
        assert client.delete(path).json() == {
            "id": response["id"],
            "object": "response",
            "deleted": True,
        }
        for method in ("GET", "DELETE"):
            answer = client.request(method, path)
            assert answer.status_code == 404
            assert response["id"] in answer.json()["error"]["message"]

    def test_input_items(self, client: TestClient) -> None:
        items = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "d"},
        ]
        first = post(client, RESPONSES, input=items)
        response = post(client, RESPONSES, input="e", previous_response_id=first["id"])
        path = f"{RESPONSES}/{response['id']}/input_items"
        listed = client.get(path, params={"order": "asc"}).json()
        kinds = ["message", "message", "function_call", "function_call_output"]
        assert [item["type"] for item in listed["data"]] == [*kinds, "message", "message"]
        assert listed["data"][4]["id"] == first["output"][0]["id"]
        answered = {"type": "output_text", "text": " upon a time", "annotations": []}
        assert listed["data"][4]["content"] == [answered]
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
        assert not listed["has_more"]
        newest = client.get(path, params={"limit": 2}).json()
        assert newest["data"] == listed["data"][:-3:-1]
        assert newest["has_more"]
        rest = client.get(path, params={"after": newest["last_id"]}).json()
        assert newest["data"] + rest["data"] == listed["data"][::-1]
        assert client.get(path, params={"after": "x"}).status_code == 400
        assert client.get(path, params={"limit": 101}).status_code == 400
        assert client.get(f"{RESPONSES}/x/input_items").status_code == 404

    def test_a_conversation_without_an_end(self, client: TestClient) -> None:
        first = post(client, RESPONSES, input=[{"role": "user", "content": ""}] * 20)
        many = [{"role": "user", "content": ""}] * 8180
        error = refused(client, RESPONSES, input=many, previous_response_id=first["id"])
        assert "8192 items" in error["message"]
        thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}] * 1000}
        items = [*[thought] * 8, {"role": "user", "content": "Hi"}]
        first = post(client, RESPONSES, input=items)
        error = refused(client, RESPONSES, input=items, previous_response_id=first["id"])
        assert "8192 content parts" in error["message"]

    def test_the_oldest_turns_are_left_out(self, client: TestClient, llm: FakeLLM) -> None:
        turns: list[dict[str, Any]] = []
        for index in range(12):
            turns += [
                {"role": "user", "content": f"Number {index}? " + "well " * 10},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "d"},
                {"role": "assistant", "content": "Yes."},
            ]
        body = {"input": [*turns, {"role": "user", "content": "Now?"}], "instructions": "Be brief."}
        assert "context length" in refused(client, RESPONSES, **body)["message"]
        whole = {**body, "truncation": "auto", "max_output_tokens": 20}
        response = post(client, RESPONSES, **whole)
        assert response["usage"]["input_tokens"] + 20 <= llm.max_model_len
        prompt = llm.submitted[-1][0].prompt or ""
        assert prompt.startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nNumber"
        )
        kept = int(prompt.split("Number ")[1].split("?")[0])
        assert kept > 0
        body["input"] = [*turns[4 * (kept - 1) :], {"role": "user", "content": "Now?"}]
        refused(client, RESPONSES, **body, max_output_tokens=20)
        too_long = refused(client, RESPONSES, input="Hi " * 300, truncation="auto")
        assert too_long["code"] == "context_length_exceeded"


def test_every_path_needs_the_key(llm: FakeLLM) -> None:
    app = create_app(ServerConfig(api_key=["secret"]), llm=llm)  # type: ignore[arg-type]
    client = TestClient(app)
    paths = [path for path in app.openapi()["paths"] if path.startswith(RESPONSES)]
    assert len(paths) == 4
    for path in paths:
        for method in ("GET", "POST", "DELETE"):
            assert client.request(method, path).status_code == 401


def test_paths_that_another_one_matches(client: TestClient) -> None:
    for path, allowed in (("/input_tokens", "POST"), ("/resp_1", "DELETE, GET, HEAD")):
        assert client.put(RESPONSES + path).headers["allow"] == allowed
    post(client, RESPONSES + "/input_tokens", input="Hi")
    metrics = client.get("/metrics").text
    assert '"/v1/responses/input_tokens"' in metrics
