"""What users of langchain-openai do. Arguments: the server's URL, its model, its key."""

# mypy: disable-error-code="import-not-found"

import asyncio
import sys
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from openai import AuthenticationError, BadRequestError
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, KEY = sys.argv[1:]
OPTIONS: dict[str, Any] = {
    "base_url": f"{URL}/v1",
    "api_key": KEY,
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 12,
    "max_retries": 0,
}
ASKED = [SystemMessage("Be brief."), HumanMessage("Tell me a fairy tale.")]
FORMED: dict[str, Any] = OPTIONS | {"max_tokens": 300, "temperature": 1}


class Animal(BaseModel):
    """What is told of."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=8)
    tame: bool


class Roll(BaseModel):
    """Roll dice."""

    model_config = ConfigDict(extra="forbid")

    number: int = Field(ge=1, le=9)


def check_chat() -> None:
    """One call, a stream and a batch give the same text."""
    chat = ChatOpenAI(**OPTIONS)
    answer = chat.invoke(ASKED)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.response_metadata["model_name"] == MODEL
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 12

    chunks = list(ChatOpenAI(**OPTIONS, stream_usage=True).stream(ASKED))
    assert "".join(chunk.text for chunk in chunks) == answer.content
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]

    batch = chat.batch([ASKED, "And another one.", ASKED])
    assert batch[0].content == batch[2].content == answer.content
    assert batch[1].content

    conversation = [*ASKED, answer, HumanMessage("Go on.")]
    assert isinstance(chat.invoke(conversation).content, str)


def check_options() -> None:
    """What is bound to a model reaches the server."""
    chat = ChatOpenAI(**OPTIONS, extra_body={"ignore_eos": True, "top_k": 1}, seed=3, logprobs=True)
    answer = chat.invoke(ASKED, top_logprobs=2)
    scores = answer.response_metadata["logprobs"]["content"]
    assert len(scores) == 12
    assert all(len(score["top_logprobs"]) == 2 for score in scores)
    generations = ChatOpenAI(**OPTIONS | {"temperature": 1}, n=3).generate([ASKED]).generations
    assert len(generations[0]) == 3
    assert "e" not in chat.bind(stop=["e"]).invoke(ASKED).text


def check_chain() -> None:
    """A prompt, the model and a parser in a row."""
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{request}")])
    chain = prompt | ChatOpenAI(**OPTIONS) | StrOutputParser()
    text = chain.invoke({"request": "Tell me a fairy tale."})
    assert text == ChatOpenAI(**OPTIONS).invoke(ASKED).text
    assert "".join(chain.stream({"request": "Tell me a fairy tale."})) == text


def check_text() -> None:
    """The class for `/v1/completions`."""
    model = OpenAI(**OPTIONS)
    text = model.invoke("Once upon a time")
    assert text
    assert "".join(model.stream("Once upon a time")) == text
    assert model.batch(["Once upon a time", "There was"])[0] == text


def check_errors() -> None:
    """What cannot be had is said so."""
    for options, error in (
        ({"api_key": "wrong"}, AuthenticationError),
        ({"temperature": -1}, BadRequestError),
    ):
        try:
            ChatOpenAI(**OPTIONS | options).invoke(ASKED)
        except error:
            continue
        raise AssertionError(f"no {error.__name__} with {options}")


def check_forms() -> None:
    """Answers in a form, by either of the ways there are."""
    chat = ChatOpenAI(**FORMED)
    for method in ("json_schema", "function_calling"):
        model = chat.with_structured_output(Animal, method=method)
        assert isinstance(model.invoke(ASKED), Animal)
        assert isinstance(list(model.stream(ASKED))[-1], Animal)
        strict = chat.with_structured_output(
            Animal, method=method, strict=True, include_raw=True
        ).invoke(ASKED)
        assert isinstance(strict["parsed"], Animal)
        assert strict["parsing_error"] is None
    schema = Animal.model_json_schema()
    told = chat.with_structured_output(schema, method="json_schema").invoke(ASKED)
    Animal.model_validate(told)


def check_tools() -> None:
    """Calls that must be made: any one, or one by name; whole and streamed."""
    chat = ChatOpenAI(**FORMED)
    classes: dict[str, Any] = {"Animal": Animal, "Roll": Roll}
    for choice in ("any", "required"):
        bound = chat.bind_tools([Animal, Roll], tool_choice=choice, parallel_tool_calls=False)
        answer = bound.invoke(ASKED)
        (call,) = answer.tool_calls
        classes[call["name"]].model_validate(call["args"])
        assert answer.response_metadata["finish_reason"] == "tool_calls"
    named = chat.bind_tools([Animal, Roll], tool_choice="Roll", strict=True)
    (call,) = named.invoke(ASKED).tool_calls
    assert Roll.model_validate(call["args"])

    whole = None
    for chunk in named.stream(ASKED):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    (call,) = whole.tool_calls
    assert call["name"] == "Roll"
    assert Roll.model_validate(call["args"])

    told = [*ASKED, whole, ToolMessage("4", tool_call_id=call["id"])]
    assert chat.bind_tools([Roll], tool_choice="none").invoke(told).text


async def check_async() -> None:
    """The same without threads."""
    chat = ChatOpenAI(**OPTIONS)
    answers = await chat.abatch([ASKED] * 6)
    assert len({answer.text for answer in answers}) == 1
    text = "".join([chunk.text async for chunk in chat.astream(ASKED)])
    assert text == (await chat.ainvoke(ASKED)).text == answers[0].text


def main() -> None:
    for check in (check_chat, check_options, check_chain, check_text, check_errors):
        check()
    check_forms()
    check_tools()
    asyncio.run(check_async())


main()
