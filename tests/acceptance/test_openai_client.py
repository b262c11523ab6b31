"""The official `openai` package on a live server: what its users do, and the errors they catch.

The client checks what it gets against OpenAI's own types, where those hold for OpenAI itself: their
`Completion` has no null, which the chunks of a stream and the first token of a prompt have.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serving import Server, free_port, serve

pytest.importorskip("openai")

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionTokenLogprob

pytestmark = pytest.mark.accept

MODEL = "tale"
KEY = "sk-test"
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a fairy tale."}]
ON_AND_ON = {"ignore_eos": True}
GREEDY: dict[str, Any] = {
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 24,
    "extra_body": ON_AND_ON,
}
ENDLESS = {"max_tokens": 3000}
ENDING: dict[str, Any] = {"max_tokens": None, "extra_body": {}}
SPELLED_OUT = {"extra_body": ON_AND_ON | {"skip_special_tokens": False}}
CHAT: dict[str, Any] = {**GREEDY, "messages": ASKED}
TEXT: dict[str, Any] = {**GREEDY, "prompt": "Once upon a time"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One that computes in float32: bfloat16 rounds by the size of the batch."""
    names = [MODEL, "other/name"]
    with serve(api_key=[KEY, "sk-other"], served_model_name=names, dtype="float32") as running:
        yield running


def options(server: Server, **more: Any) -> dict[str, Any]:
    """What both kinds of client are made with."""
    return {
        "base_url": f"{server.url}/v1",
        "api_key": KEY,
        "max_retries": 0,
        "timeout": 60,
        "_strict_response_validation": True,
    } | more


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(**options(server)) as opened:
        yield opened


@pytest.fixture(scope="module")
def lenient(server: Server) -> Iterator[OpenAI]:
    with OpenAI(**options(server, _strict_response_validation=False)) as opened:
        yield opened


def idle(server: Server) -> bool:
    """Whether the server has nothing to do, now or within a few seconds."""
    for _ in range(100):
        metrics = server.get("/metrics.json", Authorization=f"Bearer {KEY}")[1]
        if metrics["inflight_total"] == metrics["num_running"] == 0:
            return True
        time.sleep(0.05)
    return False


class TestModels:
    def test_list(self, client: OpenAI) -> None:
        models = list(client.models.list())
        assert [model.id for model in models] == [MODEL, "other/name"]
        assert {model.object for model in models} == {"model"}

    def test_retrieve(self, client: OpenAI) -> None:
        assert client.models.retrieve(MODEL).id == MODEL
        assert client.models.retrieve("other/name").id == "other/name"

    def test_every_name_answers(self, client: OpenAI) -> None:
        answers = [
            client.completions.create(**TEXT | {"model": name}) for name in (MODEL, "other/name")
        ]
        assert answers[0].choices == answers[1].choices


class TestChat:
    def test_whole(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**CHAT)
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        assert answer.model == MODEL
        assert abs(answer.created - time.time()) < 60
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.message.refusal is None
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 24
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24

    def test_request_id(self, client: OpenAI) -> None:
        named = client.chat.completions.create(**CHAT, extra_headers={"X-Request-Id": "mine-1"})
        assert named._request_id == "mine-1"
        assert client.chat.completions.create(**CHAT)._request_id

    def test_roles_parts_and_developer(self, client: OpenAI) -> None:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello."}], "name": "ann"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "And now?"},
        ]
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
        assert answer.choices[0].message.content

    def test_an_answer_goes_back_as_it_came(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**CHAT).choices[0].message
        for said in (answer, answer.model_dump()):
            messages = [*ASKED, said, {"role": "user", "content": "Go on."}]
            assert client.chat.completions.create(**CHAT | {"messages": messages}).choices

    def test_a_message_is_continued(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(**CHAT | SPELLED_OUT).choices[0].message.content
        assert whole is not None
        begun = whole[: whole.index(" ", 5)]
        extra = {"add_generation_prompt": False, "continue_final_message": True}
        rest = client.chat.completions.create(
            **CHAT
            | {
                "messages": [*ASKED, {"role": "assistant", "content": begun}],
                "extra_body": SPELLED_OUT["extra_body"] | extra,
            }
        )
        assert (begun + (rest.choices[0].message.content or "")).startswith(whole)

    def test_n_differ_and_a_seed_repeats_them(self, client: OpenAI) -> None:
        def ask() -> list[str | None]:
            answer = client.chat.completions.create(
                **CHAT | {"temperature": 1, "seed": 7, "n": 3, "max_tokens": None},
                max_completion_tokens=12,
            )
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 36
            return [choice.message.content for choice in answer.choices]

        first = ask()
        assert len(set(first)) == 3
        assert ask() == first

    def test_logprobs(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(**CHAT | SPELLED_OUT, logprobs=True, top_logprobs=4)
        (choice,) = answer.choices
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        check_chat_logprobs(tokens, choice.message.content or "", num_top=4)

    def test_stop(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(**CHAT).choices[0].message.content or ""
        word = whole.split()[3]
        stopped = client.chat.completions.create(**CHAT, stop=[word, "never there"]).choices[0]
        assert stopped.message.content == whole[: whole.index(word)]
        assert stopped.finish_reason == "stop"

    def test_the_model_ends_it_by_itself(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            **CHAT | ENDING, logit_bias={eos_token(client): 100}
        )
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
        assert answer.choices[0].message.content == ""

    def test_raw_response(self, client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(**CHAT)
        assert raw.headers["content-type"] == "application/json"
        assert raw.parse().choices == client.chat.completions.create(**CHAT).choices

    def test_cached_tokens(self, client: OpenAI) -> None:
        messages = [{"role": "user", "content": "a long way through the woods " * 10}]
        for _ in range(2):
            answer = client.chat.completions.create(**CHAT | {"messages": messages})
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        assert details is not None
        assert (details.cached_tokens or 0) >= 16


def check_chat_logprobs(tokens: list[ChatCompletionTokenLogprob], text: str, num_top: int) -> None:
    """Greedy tokens spell the text, and each is the likeliest of those named."""
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == text
    for token in tokens:
        ranked = [top.logprob for top in token.top_logprobs]
        assert len(ranked) == num_top
        assert ranked == sorted(ranked, reverse=True)
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == ranked[0] <= 0


def eos_token(client: OpenAI) -> str:
    """The id of the token that ends a text, as a key of JSON."""
    (token_id,) = tokenize(client, "<|im_end|>")
    return str(token_id)


def tokenize(client: OpenAI, text: str) -> list[int]:
    """The tokens of a text, asked for beside the API that the package knows."""
    raw = client.post("../tokenize", body={"prompt": text}, cast_to=dict[str, Any])
    tokens: list[int] = raw["tokens"]
    return tokens


class TestChatStream:
    def test_chunks_add_up(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(**CHAT)
        chunks = list(
            client.chat.completions.create(
                **CHAT, stream=True, stream_options={"include_usage": True}
            )
        )
        *deltas, last = chunks
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert deltas[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
        assert text == whole.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in deltas] == [
            *[None] * (len(deltas) - 1),
            "length",
        ]
        assert last.choices == []
        assert whole.usage is not None
        assert last.usage is not None
        assert last.usage.total_tokens == whole.usage.total_tokens

    def test_n_streams_in_one(self, client: OpenAI) -> None:
        sampled = CHAT | {"temperature": 1, "seed": 3, "n": 4}
        whole = client.chat.completions.create(**sampled)
        texts = [""] * 4
        for chunk in client.chat.completions.create(**sampled, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]

    def test_logprobs(self, client: OpenAI) -> None:
        text = ""
        tokens: list[ChatCompletionTokenLogprob] = []
        for chunk in client.chat.completions.create(
            **CHAT | SPELLED_OUT, logprobs=True, top_logprobs=2, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
            if (logprobs := chunk.choices[0].logprobs) is not None:
                tokens += logprobs.content or []
        assert len(tokens) == 24
        check_chat_logprobs(tokens, text, num_top=2)

    def test_stream_helper(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(**CHAT | ENDING)
        with client.chat.completions.stream(**CHAT | ENDING) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        deltas = [event.delta for event in events if event.type == "content.delta"]
        (done,) = [event for event in events if event.type == "content.done"]
        assert "".join(deltas) == done.content == whole.choices[0].message.content
        assert final.choices[0].message.content == done.content
        assert final.choices[0].finish_reason == "stop"

    def test_stream_helper_is_told_of_a_cut(self, client: OpenAI) -> None:
        with (
            client.chat.completions.stream(**CHAT) as stream,
            pytest.raises(openai.LengthFinishReasonError),
        ):
            stream.get_final_completion()

    def test_streamed_response_as_text(self, client: OpenAI) -> None:
        with client.chat.completions.with_streaming_response.create(
            **CHAT, stream=True
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1])

    def test_leaving_early_frees_everything(self, client: OpenAI, server: Server) -> None:
        stream = client.chat.completions.create(**CHAT | ENDLESS, stream=True)
        next(stream)
        stream.close()
        assert idle(server)


class TestCompletions:
    def test_whole_and_streamed(self, client: OpenAI, lenient: OpenAI) -> None:
        whole = client.completions.create(**TEXT)
        assert whole.object == "text_completion"
        assert whole.id.startswith("cmpl-")
        chunks = list(lenient.completions.create(**TEXT, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"

    def test_a_stream_counts_and_names_tokens(self, lenient: OpenAI) -> None:
        extra = {"return_token_ids": True, **ON_AND_ON}
        *chunks, last = lenient.completions.create(
            **TEXT | {"extra_body": extra}, stream=True, stream_options={"include_usage": True}
        )
        named = [chunk.choices[0].model_extra or {} for chunk in chunks]
        prompt = [token for choice in named for token in choice.get("prompt_token_ids") or []]
        made = [token for choice in named for token in choice.get("token_ids") or []]
        assert prompt == tokenize(lenient, "Once upon a time")
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 24)
        assert len(made) == 24

    def test_prompts_as_tokens_and_lists(self, client: OpenAI) -> None:
        texts = ["Once upon a time", "There was a king"]
        ids = [tokenize(client, text) for text in texts]
        alone = [client.completions.create(**TEXT | {"prompt": text}) for text in texts]
        expected = [answer.choices[0].text for answer in alone]
        for prompts in (texts, ids):
            together = client.completions.create(**TEXT | {"prompt": prompts})
            assert [choice.index for choice in together.choices] == [0, 1]
            assert [choice.text for choice in together.choices] == expected
            assert together.usage is not None
            assert together.usage.prompt_tokens == sum(map(len, ids))
        one = client.completions.create(**TEXT | {"prompt": ids[1]})
        assert one.choices[0].text == expected[1]

    def test_prompts_times_n(self, client: OpenAI) -> None:
        answer = client.completions.create(
            **TEXT | {"prompt": ["A cat", "A dog"], "n": 2, "temperature": 1}
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4 * 24

    @pytest.mark.parametrize("max_tokens", [0, 5])
    def test_echo_with_logprobs(self, lenient: OpenAI, max_tokens: int) -> None:
        prompt = "Once upon a time, there was a king"
        answer = lenient.completions.create(
            **TEXT | {"prompt": prompt, "max_tokens": max_tokens}, echo=True, logprobs=2
        )
        (choice,) = answer.choices
        assert choice.text.startswith(prompt)
        scores = choice.logprobs
        assert scores is not None
        tokens = scores.tokens or []
        assert len(tokens) == len(tokenize(lenient, prompt)) + max_tokens
        assert "".join(tokens) == choice.text
        starts = scores.text_offset or []
        assert [choice.text[start:][: len(t)] for start, t in zip(starts, tokens, strict=True)] == (
            tokens
        )
        values = scores.token_logprobs or []
        assert values[0] is None
        assert all(value <= 0 for value in values[1:])
        assert (choice.text == prompt) is (max_tokens == 0)

    def test_stop_and_vllm_extras(self, client: OpenAI) -> None:
        whole = client.completions.create(**TEXT).choices[0].text
        word = whole.split()[2]
        extra = {"include_stop_str_in_output": True, "top_k": 5, "min_p": 0.1, "priority": 1}
        (choice,) = client.completions.create(**TEXT | {"stop": word, "extra_body": extra}).choices
        assert choice.text == whole[: whole.index(word) + len(word)]
        assert choice.finish_reason == "stop"
        assert choice.model_extra is not None
        assert choice.model_extra["stop_reason"] == word


class TestErrors:
    def test_unknown_model(self, client: OpenAI) -> None:
        calls: tuple[Callable[[], Any], ...] = (
            lambda: client.chat.completions.create(**CHAT | {"model": "gpt-7"}),
            lambda: client.completions.create(**TEXT | {"model": "gpt-7"}, stream=True),
            lambda: client.models.retrieve("gpt-7"),
        )
        for ask in calls:
            with pytest.raises(openai.NotFoundError, match="gpt-7") as caught:
                ask()
            assert caught.value.code == "model_not_found"
            assert caught.value.param == "model"

    def test_unknown_route(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.images.generate(model=MODEL, prompt="x")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -1),
            ("top_p", 1.5),
            ("n", 10**9),
            ("max_tokens", "many"),
            ("stop", ["x"] * 1000),
            ("top_logprobs", 21),
            ("logit_bias", {"5": 1000}),
            ("logit_bias", {"99999999": 1}),
            ("messages", []),
            ("messages", [{"role": "robot", "content": "x"}]),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_bad_field_is_named(
        self, client: OpenAI, field: str, value: Any, stream: bool
    ) -> None:
        request = CHAT | {"logprobs": True, field: value, "stream": stream}
        with pytest.raises(openai.BadRequestError, match=field) as caught:
            client.chat.completions.create(**request)
        assert caught.value.type == "invalid_request_error"
        assert (caught.value.param or "").startswith(field)

    def test_too_long_a_prompt(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="maximum context length is") as caught:
            client.completions.create(**TEXT | {"prompt": "far away " * 5000})
        assert caught.value.code == "context_length_exceeded"

    @pytest.mark.parametrize(
        "refused",
        [
            {"response_format": {"type": "grammar"}},
            {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            {"extra_body": {"chat_template": "{{ 7 * 7 }}"}},
            {"extra_body": {"chat_template_kwargs": {"tokenize": True}}},
        ],
    )
    def test_what_is_not_served_is_refused_by_name(
        self, client: OpenAI, refused: dict[str, Any]
    ) -> None:
        (name,) = refused.get("extra_body", refused)
        with pytest.raises(openai.BadRequestError, match=name):
            client.chat.completions.create(**CHAT | refused)

    def test_no_key_and_a_wrong_one(self, server: Server) -> None:
        for key in ("sk-wrong", "sk-tes", "sk-test2"):
            with (
                OpenAI(**options(server, api_key=key)) as stranger,
                pytest.raises(openai.AuthenticationError) as caught,
            ):
                stranger.models.list()
            assert caught.value.code == "invalid_api_key"

    def test_every_key_opens(self, server: Server) -> None:
        with OpenAI(**options(server, api_key="sk-other")) as other:
            assert other.completions.create(**TEXT).choices

    def test_nobody_there(self) -> None:
        with (
            OpenAI(
                base_url=f"http://127.0.0.1:{free_port()}", api_key=KEY, max_retries=0
            ) as lonely,
            pytest.raises(openai.APIConnectionError),
        ):
            lonely.models.list()

    def test_a_client_that_gives_up(self, client: OpenAI, server: Server) -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**CHAT | ENDLESS)
        assert idle(server)

    def test_a_full_queue_is_tried_again(self) -> None:
        async def crowd(client: AsyncOpenAI) -> list[Any]:
            requests = (client.completions.create(**TEXT | {"max_tokens": 200}) for _ in range(6))
            return await asyncio.gather(*requests, return_exceptions=True)

        async def use(busy: Server) -> None:
            async with AsyncOpenAI(**options(busy)) as client:
                answers = await crowd(client)
                refused = [a for a in answers if isinstance(a, openai.InternalServerError)]
                assert 1 <= len(refused) <= 4
                assert len([answer for answer in answers if answer not in refused]) >= 2
                for error in refused:
                    assert error.status_code == 503
                    assert int(error.response.headers["retry-after"]) >= 1
                patient = client.with_options(max_retries=10)
                assert all(answer.choices for answer in await crowd(patient))

        with serve(max_num_seqs=1, max_num_queued_reqs=1, served_model_name=MODEL) as busy:
            asyncio.run(use(busy))


class TestAsync:
    def test_many_at_once_get_what_they_get_alone(self, client: OpenAI, server: Server) -> None:
        prompts = [f"Chapter {number}. There was" for number in range(24)]
        alone = [
            client.completions.create(**TEXT | {"prompt": prompt}).choices[0].text
            for prompt in prompts[:4]
        ]

        async def stream(own: AsyncOpenAI, prompt: str) -> str:
            text = ""
            async for chunk in await own.completions.create(
                **TEXT | {"prompt": prompt}, stream=True
            ):
                text += chunk.choices[0].text
            return text

        async def ask_all() -> list[str]:
            async with AsyncOpenAI(**options(server, _strict_response_validation=False)) as own:
                return await asyncio.gather(*(stream(own, prompt) for prompt in prompts))

        together = asyncio.run(ask_all())
        assert all(together)
        assert together[:4] == alone

    def test_whole_chat_models_and_errors(self, server: Server) -> None:
        async def use() -> None:
            async with AsyncOpenAI(**options(server)) as client:
                assert (await client.chat.completions.create(**CHAT)).choices
                assert [model.id async for model in client.models.list()] == [MODEL, "other/name"]
                with pytest.raises(openai.BadRequestError):
                    await client.chat.completions.create(**CHAT | {"n": 0})

        asyncio.run(use())

    def test_a_cancelled_task_frees_everything(self, server: Server) -> None:
        async def use() -> None:
            async with AsyncOpenAI(**options(server)) as client:
                task = asyncio.ensure_future(client.chat.completions.create(**CHAT | ENDLESS))
                await asyncio.sleep(0.5)
                assert not task.done()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(use())
        assert idle(server)

    def test_stream_helper(self, server: Server) -> None:
        async def use() -> None:
            async with AsyncOpenAI(**options(server)) as client:
                async with client.chat.completions.stream(**CHAT | ENDING) as stream:
                    deltas = [
                        event.delta async for event in stream if event.type == "content.delta"
                    ]
                    final = await stream.get_final_completion()
                assert "".join(deltas) == final.choices[0].message.content

        asyncio.run(use())


class TestEmbeddings:
    def test_numbers_and_bytes_are_the_same(self, client: OpenAI, lenient: OpenAI) -> None:
        texts = ["The king had a daughter.", "A wolf!"]
        # Base64 is the client's own default, and it is strict before it has decoded it.
        as_bytes = lenient.embeddings.create(model=MODEL, input=texts)
        numbers = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
        assert [item.index for item in numbers.data] == [0, 1]
        for one, other in zip(numbers.data, as_bytes.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
            assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
        assert numbers.usage.total_tokens == numbers.usage.prompt_tokens > 4
        first = lenient.embeddings.create(model=MODEL, input=texts[0], dimensions=8)
        assert len(first.data[0].embedding) == 8

    def test_errors(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="dimensions must be between 1 and") as e:
            client.embeddings.create(model=MODEL, input="A", dimensions=100_000)
        assert e.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError, match="maximum context length") as e:
            client.embeddings.create(model=MODEL, input="A king " * 5000)
        assert (e.value.param, e.value.code) == ("input", "context_length_exceeded")

    def test_many_at_once_beside_others(self, server: Server) -> None:
        async def scenario() -> tuple[Any, ...]:
            lenient = options(server, _strict_response_validation=False)
            async with AsyncOpenAI(**lenient) as client:
                return await asyncio.gather(
                    client.embeddings.create(model=MODEL, input=[f"Tale {i}" for i in range(300)]),
                    client.embeddings.create(model=MODEL, input="Tale 7"),
                    client.completions.create(**TEXT),
                )

        many, one, told = asyncio.run(scenario())
        assert many.data[7].embedding == pytest.approx(one.data[0].embedding, abs=1e-4)
        assert told.usage.completion_tokens == 24


def test_decisions(client: OpenAI) -> None:
    decision = client.decisions.create(
        model=MODEL,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "The wolf ate."}]}],
        questions=[
            {"type": "predicate", "instructions": "The wolf is hungry.", "name": "hungry"},
            {
                "type": "choice",
                "instructions": "Who?",
                "choices": [{"value": "wolf"}, {"value": True}],
            },
            {
                "type": "score",
                "instructions": [{"type": "input_text", "text": "How old is it?"}],
                "levels": [{"label": "young"}, {"label": "old", "description": "very"}],
            },
        ],
    )
    predicate, choice, score = decision.answers
    assert predicate.type == "predicate"
    assert predicate.name == "hungry"
    assert 0 < predicate.probability < 1
    assert choice.type == "choice"
    assert choice.choice in ("wolf", True)
    assert sum(item.probability for item in choice.probabilities) == pytest.approx(1)
    assert score.type == "score"
    assert score.score == pytest.approx(score.probabilities[1].probability)
    assert decision.usage.output_tokens == 3
    assert decision.usage.total_tokens == decision.usage.input_tokens + 3
    with pytest.raises(openai.BadRequestError, match="two of the same value"):
        client.decisions.create(
            model=MODEL,
            input="x",
            questions=[
                {"type": "choice", "instructions": "?", "choices": [{"value": "a"}, {"value": "a"}]}
            ],
        )
