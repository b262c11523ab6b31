"""OpenAI's agents, which speak to `/v1/responses`. Arguments: the server's URL, its key.

The server's model has a script; see `test_responses.py`.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, misc"

import asyncio
import sys
from typing import Any

from agents import (
    Agent,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, KEY = sys.argv[1:]
ASKED = "Where is it warmer?"
ANSWER = "It is warmer in Paris."
DEGREES = {"Paris": 21, "Oslo": 9}


class Place(BaseModel):
    """Where it is."""

    city: str
    degrees: int


@function_tool
def weather(city: str) -> str:
    """How warm it is in a city."""
    return f"{DEGREES[city]} degrees"


def make_agent(**options: Any) -> Any:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    model = OpenAIResponsesModel(model="demo_model", openai_client=client)
    return Agent(name="Forecaster", model=model, **options)


async def check_tools() -> None:
    """Two calls at once, their results and the answer; whole and streamed."""
    agent = make_agent(instructions="You know the weather.", tools=[weather])
    whole = await Runner.run(agent, ASKED)
    streamed = Runner.run_streamed(agent, ASKED)
    events = [event async for event in streamed.stream_events()]
    for result in (whole, streamed):
        kinds = [item.type for item in result.new_items]
        calls, outputs = ["tool_call_item"] * 2, ["tool_call_output_item"] * 2
        assert kinds == ["message_output_item", *calls, *outputs, "message_output_item"], kinds
        assert result.final_output == ANSWER
    raw = [event.data for event in events if event.type == "raw_response_event"]
    deltas = [data.delta for data in raw if data.type == "response.output_text.delta"]
    assert "".join(deltas).endswith(ANSWER)


async def check_going_on() -> None:
    """The conversation of the server's memory is that of the client's."""
    agent = make_agent(instructions="You know the weather.", tools=[weather])
    first = await Runner.run(agent, ASKED)
    thanked = {"role": "user", "content": "Thanks."}
    kept = await Runner.run(agent, "Thanks.", previous_response_id=first.last_response_id)
    sent = await Runner.run(agent, [*first.to_input_list(), thanked])
    assert kept.final_output == sent.final_output == "Not at all."


async def check_form() -> None:
    result = await Runner.run(make_agent(output_type=Place), "A place?")
    assert result.final_output == Place(city="Oslo", degrees=9)


async def check_handoff() -> None:
    expert = make_agent(instructions="You know the weather.", tools=[weather])
    desk = make_agent(instructions="You ask others.", handoffs=[handoff(expert)])
    result = await Runner.run(desk, ASKED)
    assert result.last_agent is expert
    assert result.final_output == ANSWER


async def main() -> None:
    set_tracing_disabled(True)
    await check_tools()
    await check_going_on()
    await check_form()
    await check_handoff()


asyncio.run(main())
