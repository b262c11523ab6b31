"""What users of instructor do. Arguments: the server's URL, its model, its key.

The bundled model has never seen a schema: what is right here is right by the grammar.
"""

# mypy: disable-error-code="import-not-found"

import asyncio
import sys
from typing import Any, Literal

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, KEY = sys.argv[1:]
CLIENT: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
ASKED: list[Any] = [{"role": "user", "content": "Tell me of an animal."}]
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "messages": ASKED,
    "max_tokens": 500,
    "temperature": 1.0,
    "max_retries": 1,
}
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class Closed(BaseModel):
    """Without fields of the model's own invention, of which there would be no end."""

    model_config = ConfigDict(extra="forbid")


class Home(Closed):
    """Where it lives."""

    town: str = Field(max_length=12)
    far: bool


class Animal(Closed):
    """What is told of."""

    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=8)
    names: list[Literal["Tom", "Kit"]] = Field(max_length=3)
    home: Home | None


def check_whole(mode: instructor.Mode) -> None:
    """An object of the class, and what it was made of."""
    client = instructor.from_openai(OpenAI(**CLIENT), mode=mode)
    for seed in range(3):
        animal, raw = client.chat.completions.create_with_completion(
            **SETTINGS, seed=seed, response_model=Animal
        )
        assert isinstance(animal, Animal)
        assert raw.choices[0].finish_reason in ("stop", "tool_calls")
        assert raw.usage.completion_tokens > 0


def check_partial(mode: instructor.Mode) -> None:
    """An object that grows, and is whole in the end."""
    client = instructor.from_openai(OpenAI(**CLIENT), mode=mode)
    parts = list(client.chat.completions.create_partial(**SETTINGS, response_model=Animal))
    assert len(parts) > 2
    Animal.model_validate(parts[-1].model_dump())
    assert all(parts[-1].kind.startswith(part.kind or "") for part in parts)


def check_iterable(mode: instructor.Mode) -> None:
    """Several objects, each as soon as it is there."""
    client = instructor.from_openai(OpenAI(**CLIENT), mode=mode)
    made = client.chat.completions.create_iterable(
        **SETTINGS | {"max_tokens": 60}, response_model=Home
    )
    try:
        homes = list(made)
    except instructor.exceptions.InstructorError:
        return  # a list without end was cut short
    assert all(isinstance(home, Home) for home in homes)


async def check_async(mode: instructor.Mode) -> None:
    """Many at once, whole and in parts."""
    async with AsyncOpenAI(**CLIENT) as opened:
        client = instructor.from_openai(opened, mode=mode)
        animals = await asyncio.gather(
            *(
                client.chat.completions.create(**SETTINGS, seed=seed, response_model=Animal)
                for seed in range(4)
            )
        )
        assert all(isinstance(animal, Animal) for animal in animals)
        last = None
        async for part in client.chat.completions.create_partial(**SETTINGS, response_model=Home):
            last = part
        assert last is not None
        Home.model_validate(last.model_dump())


def main() -> None:
    for mode in MODES:
        check_whole(mode)
        check_partial(mode)
        check_iterable(mode)
        asyncio.run(check_async(mode))


main()
