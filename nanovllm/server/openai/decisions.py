"""`POST /v1/decisions`."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from nanovllm.server.decisions import MAX_QUESTIONS, Asked, Decided, DecisionOptions, respond
from nanovllm.server.fields import FAIL_FAST, Text, WireModel
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.responses.items import Content, Items, text_of
from nanovllm.server.responses.messages import messages_of
from nanovllm.server.state import State
from nanovllm.text.decisions import (
    BY_DIGIT,
    MAX_LEVELS,
    MAX_OPTIONS,
    Decision,
    Option,
    Question,
)

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


def _as_text(part: Any) -> Any:
    """A part of a content with its JSON written out."""
    if isinstance(part, dict) and part.get("type") == "input_json" and "data" in part:
        return {"type": "input_text", "text": json.dumps(part["data"], ensure_ascii=False)}
    return part


def _write_json_out(content: Any) -> Any:
    """The same of all parts of a content, or of the items of a conversation."""
    if not isinstance(content, list):
        return content
    return [
        part | {name: _write_json_out(part[name]) for name in part.keys() & {"content", "output"}}
        if isinstance(part, dict) and part.get("type") != "input_json"
        else _as_text(part)
        for part in content
    ]


WITH_JSON = BeforeValidator(_write_json_out)
Instructions = Annotated[Content, WITH_JSON]


class PredicateQuestion(WireModel):
    """How likely it is that something is true."""

    type: Literal["predicate"]
    name: str | None = None
    instructions: Instructions

    def question(self, param: str) -> Question:
        """What the model is asked."""
        return Question.whether(text_of(self.instructions), param)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it."""
        return {"probability": decision.probabilities[0]}


class ChoiceValue(WireModel):
    """One of the values to choose from."""

    value: str | bool
    description: str | None = None


def _written(value: str | bool) -> str:
    return json.dumps(value) if isinstance(value, bool) else value


def _check_values(choices: list[ChoiceValue]) -> list[ChoiceValue]:
    if len({(type(choice.value), choice.value) for choice in choices}) < len(choices):
        raise PydanticCustomError("not_accepted", "must have no two of the same value")
    return choices


class ChoiceQuestion(WireModel):
    """Which of some values fits best."""

    type: Literal["choice"]
    name: str | None = None
    instructions: Instructions
    choices: Annotated[
        list[ChoiceValue],
        Field(min_length=2, max_length=MAX_OPTIONS),
        FAIL_FAST,
        AfterValidator(_check_values),
    ]

    def question(self, param: str) -> Question:
        """What the model is asked."""
        options = [Option(_written(choice.value), choice.description) for choice in self.choices]
        return Question(text_of(self.instructions), options, param=param)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it."""
        values = [choice.value for choice in self.choices]
        shares = zip(values, decision.probabilities, strict=True)
        return {
            "choice": values[decision.best],
            "confidence": decision.confidence,
            "probabilities": [{"value": value, "probability": share} for value, share in shares],
        }


class ScoreLevel(WireModel):
    """One of the levels of a score."""

    label: Text
    description: str | None = None


class ScoreQuestion(WireModel):
    """Which of some levels fits best."""

    type: Literal["score"]
    name: str | None = None
    instructions: Instructions
    levels: Annotated[list[ScoreLevel], Field(min_length=2, max_length=MAX_LEVELS), FAIL_FAST]

    def question(self, param: str) -> Question:
        """What the model is asked."""
        options = [Option(level.label, level.description) for level in self.levels]
        return Question(text_of(self.instructions), options, BY_DIGIT, param)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it."""
        levels = enumerate(zip(self.levels, decision.probabilities, strict=True))
        return {
            "score": decision.score,
            "confidence": decision.confidence,
            "probabilities": [
                {"value": value, "label": level.label, "probability": share}
                for value, (level, share) in levels
            ],
        }


class DecisionRequest(DecisionOptions):
    """Questions about something. Fields that OpenAI does not have are vLLM's."""

    input: Annotated[Text | Annotated[Items, Field(min_length=1)], WITH_JSON]
    questions: Annotated[
        list[Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Discriminator("type")]],
        Field(min_length=1, max_length=MAX_QUESTIONS),
        FAIL_FAST,
    ]
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class PredicateAnswer(TypedDict):
    """How likely it is to be true."""

    type: Literal["predicate"]
    name: str | None
    probability: float


class ValueProbability(TypedDict):
    """How likely a value is among all of them."""

    value: str | bool
    probability: float


class ChoiceAnswer(TypedDict):
    """The likeliest value; its `confidence` is that of its label among all tokens."""

    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ValueProbability]


class LevelProbability(TypedDict):
    """How likely a level is among all of them; the first one has the value 0."""

    value: int
    label: str
    probability: float


class ScoreAnswer(TypedDict):
    """The level to be expected, which may lie between two; `confidence` is as for a choice."""

    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class InputTokensDetails(TypedDict):
    """Where the tokens of the prompts came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """What the tokens of the replies were."""

    reasoning_tokens: int


class DecisionUsage(TypedDict):
    """Tokens of the prompts, one for each question, and of the replies, one token each."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Decisions(TypedDict):
    """The answer of `/v1/decisions`, in the order of the questions."""

    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer]
    usage: DecisionUsage


@router.post("/v1/decisions", response_model=Decisions)
async def decide(body: DecisionRequest, request: Request, state: State) -> Response:
    """Answer questions about a text or a conversation by the probability of each answer."""
    if isinstance(body.input, str):
        messages = [{"role": "user", "content": body.input}]
    else:
        messages = messages_of(body.input)
    questions = [
        question.question(f"questions.{index}") for index, question in enumerate(body.questions)
    ]

    def tell(decided: Decided) -> dict[str, Any]:
        asked = zip(body.questions, decided.decisions, strict=True)
        num_input, num_output = decided.num_prompt_tokens, len(decided.decisions)
        return {
            "model": decided.model,
            "answers": [
                {"type": question.type, "name": question.name, **question.answer(decision)}
                for question, decision in asked
            ],
            "usage": {
                "input_tokens": num_input,
                "input_tokens_details": {
                    "cached_tokens": decided.num_cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": num_output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_input + num_output,
            },
        }

    return await respond(request, state, body, Asked(messages, questions, "input"), tell)
