"""Agents of langchain with tools that the model may call. Arguments: the server's URL, its key.

The server's model has a script; see `test_clients.py`.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator"

import asyncio
import sys
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

URL, KEY = sys.argv[1:]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Where is it warmer?"}]}
FIRST = "I know of two cities."
ANSWER = "It is warmer in Paris."
PROMPT = "You know the weather."
CALLS = [("weather", {"city": "Paris"}), ("weather", {"city": "Oslo"})]


@tool
def weather(city: str, unit: str = "celsius") -> str:
    """How warm it is in a city."""
    return f"{ {'Paris': 21, 'Oslo': 9}[city] } degrees {unit}"


def make_agent(**options: Any) -> Any:
    chat = ChatOpenAI(
        base_url=f"{URL}/v1", api_key=KEY, model="demo_model", max_retries=0, **options
    )
    return create_agent(chat, tools=[weather], system_prompt=PROMPT)


def check(messages: list[Any]) -> None:
    """A question, two calls at once, their results and the answer."""
    _, calls, *results, answer = messages
    assert isinstance(calls, AIMessage)
    assert calls.text == FIRST
    assert [(call["name"], call["args"]) for call in calls.tool_calls] == CALLS
    assert all(isinstance(result, ToolMessage) for result in results)
    assert [result.content for result in results] == ["21 degrees celsius", "9 degrees celsius"]
    assert [result.tool_call_id for result in results] == [c["id"] for c in calls.tool_calls]
    assert answer.text == ANSWER
    assert not answer.tool_calls


KINDS: list[dict[str, Any]] = [{}, {"streaming": True}, {"use_responses_api": True}]


async def check_async() -> None:
    for options in KINDS:
        check((await make_agent(**options).ainvoke(ASKED))["messages"])


def main() -> None:
    for options in KINDS:
        check(make_agent(**options).invoke(ASKED)["messages"])
    asyncio.run(check_async())
    parts = make_agent(streaming=True).stream(ASKED, stream_mode="messages")
    texts = [part.text for part, about in parts if about["langgraph_node"] == "model"]
    assert "".join(texts) == FIRST + ANSWER
    assert len(texts) > 3


main()
