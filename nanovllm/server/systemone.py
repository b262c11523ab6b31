"""`POST /v1/systemone`: decisions in the words of vLLM, Ollama and llama.cpp."""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Discriminator, Field
from typing_extensions import TypedDict

from nanovllm.server.decisions import MAX_QUESTIONS, Asked, Decided, DecisionOptions, respond
from nanovllm.server.fields import FAIL_FAST, WireModel, not_served
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.state import State
from nanovllm.text.decisions import (
    BY_DIGIT,
    MAX_LEVELS,
    MAX_OPTIONS,
    Decision,
    Option,
    Question,
)

router = APIRouter(route_class=JSONRoute, tags=["Decisions"])

NoMedia = Annotated[
    Annotated[list[str], Field(max_length=0)] | None, not_served("this model reads text")
]


def _text_of(value: Any) -> str:
    """What the model reads of text or any other JSON; of null nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


class Strict(WireModel):
    """A field that we do not know may be a known one with a slip of the pen: it is refused."""

    model_config = ConfigDict(extra="forbid")


class NoulCriteria(Strict):
    """What speaks for either answer."""

    true: Any = None
    false: Any = None


class NoulQuestion(Strict):
    """Yes or no."""

    type: Literal["noul"]
    instructions: Any = ""
    criteria: NoulCriteria | None = None

    def question(self, param: str) -> Question:
        """What the model is asked."""
        criteria = self.criteria or NoulCriteria()
        sides = _text_of(criteria.true), _text_of(criteria.false)
        return Question.whether(_text_of(self.instructions), param, *sides)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it."""
        yes, no = decision.probabilities
        return {"noul": yes, "probabilities": {"yes": yes, "no": no}}


class ChoiceQuestion(Strict):
    """One of some options, each of which may be described."""

    type: Literal["choice"]
    instructions: Any = ""
    criteria: Annotated[dict[str, Any], Field(min_length=1, max_length=MAX_OPTIONS)]

    def question(self, param: str) -> Question:
        """What the model is asked."""
        options = [Option(name, _text_of(value)) for name, value in self.criteria.items()]
        return Question(_text_of(self.instructions), options, param=param)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it."""
        names = list(self.criteria)
        shares = dict(zip(names, decision.probabilities, strict=True))
        return {"choice": names[decision.best], "probabilities": shares}


class ScoreQuestion(Strict):
    """A level of a scale, from the lowest on."""

    type: Literal["score"]
    instructions: Any = ""
    criteria: Annotated[list[Any], Field(min_length=2, max_length=MAX_LEVELS)]

    def question(self, param: str) -> Question:
        """What the model is asked."""
        options = [Option(_text_of(level)) for level in self.criteria]
        return Question(_text_of(self.instructions), options, BY_DIGIT, param)

    def answer(self, decision: Decision) -> dict[str, Any]:
        """What becomes of it; levels are counted from 0."""
        return {
            "score": decision.score,
            "legend": {str(i): _text_of(level) for i, level in enumerate(self.criteria)},
            "probabilities": {str(i): share for i, share in enumerate(decision.probabilities)},
        }


class SystemOneRequest(DecisionOptions):
    """Questions about something, each under a name of the client's."""

    state: Any = Field(description="What they are about: text or any other JSON.")
    questions: Annotated[
        dict[
            Annotated[str, Field(min_length=1)],
            Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion, Discriminator("type")],
        ],
        Field(min_length=1, max_length=MAX_QUESTIONS),
        FAIL_FAST,
    ]
    instructions: str | None = Field(None, description="Said before the questions.")
    images: NoMedia = None
    audio: NoMedia = None
    videos: NoMedia = None


class SystemOneAnswer(TypedDict, total=False):
    """The answer to a question, by its `type`; `confidence` is of its label among all tokens."""

    type: Literal["noul", "choice", "score"]
    noul: float
    choice: str
    score: float
    legend: dict[str, str]
    probabilities: dict[str, float]
    confidence: float


class SystemOneUsage(TypedDict):
    """Tokens of the prompts, one for each question, and of the replies, one token each."""

    input_tokens: int
    output_tokens: int


class Diagnostics(TypedDict):
    """How much the labels weigh among all tokens, and whether the likeliest token is one."""

    label_mass: float
    argmax_is_label: bool


class SystemOneDecision(TypedDict):
    """The answer of `/v1/systemone`, by the names of the questions."""

    id: str
    object: Literal["structured_decision"]
    created: int
    model: str
    answers: dict[str, SystemOneAnswer]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnostics]


@router.post("/v1/systemone", response_model=SystemOneDecision)
async def decide(body: SystemOneRequest, request: Request, state: State) -> Response:
    """Answer named questions about a state by the probability of each answer."""
    about = "\n\n".join(filter(None, [_text_of(body.state), body.instructions]))
    questions = [
        question.question(f"questions.{key:.80}") for key, question in body.questions.items()
    ]

    def tell(decided: Decided) -> dict[str, Any]:
        named = dict(zip(body.questions, decided.decisions, strict=True))
        return {
            "id": f"decision-{decided.request_id}",
            "object": "structured_decision",
            "created": int(time.time()),
            "model": decided.model,
            "answers": _answers(body.questions, named),
            "usage": {
                "input_tokens": decided.num_prompt_tokens,
                "output_tokens": len(decided.decisions),
            },
            "diagnostics": {
                key: {"label_mass": d.label_mass, "argmax_is_label": d.argmax_is_label}
                for key, d in named.items()
            },
        }

    messages = [{"role": "user", "content": about}]
    return await respond(request, state, body, Asked(messages, questions, "state"), tell)


def _answers(
    questions: Mapping[str, NoulQuestion | ChoiceQuestion | ScoreQuestion],
    decisions: Mapping[str, Decision],
) -> dict[str, Any]:
    return {
        key: {"type": question.type}
        | question.answer(decisions[key])
        | {"confidence": decisions[key].confidence}
        for key, question in questions.items()
    }
