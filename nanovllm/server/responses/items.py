"""The items of a conversation as clients send them to `/v1/responses`."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from nanovllm.server.chat.wire import RefusalPart
from nanovllm.server.fields import FAIL_FAST, MAX_LIST_LENGTH, WireModel

MAX_ITEMS = 1 << 13
"""Items and parts of them, all together; checked in some 0.05 s."""

TEXT_KINDS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
Status = Literal["in_progress", "completed", "incomplete"]


def _check_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in (*TEXT_KINDS, "refusal"):
        raise PydanticCustomError(
            "not_accepted",
            "'{kind}' is not supported: this model reads and writes text",
            {"kind": kind[:80]},
        )
    return part


class TextPart(WireModel):
    """A piece of text, under any of the names that the API has for one."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


def _kind_of_part(part: Any) -> str:
    # Names with a space, so that they are no part of the path in an error's `param`.
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "a refusal" if kind == "refusal" else "a text"


Part = Annotated[
    Annotated[TextPart, Tag("a text")] | Annotated[RefusalPart, Tag("a refusal")],
    Discriminator(_kind_of_part),
    BeforeValidator(_check_part),
]
Parts = Annotated[list[Part], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST]
Content = str | Parts


class MessageItem(WireModel):
    """A message, of the client's or one that was answered before."""

    type: Literal["message"] | None = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    status: Status | None = None


class FunctionCallItem(WireModel):
    """A call of the model's."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: str
    name: str
    arguments: str
    status: Status | None = None


class FunctionCallOutputItem(WireModel):
    """What the function gave back."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str
    output: Content
    status: Status | None = None


class ReasoningItem(WireModel):
    """What the model thought: `content`, or else the `summary`, is shown to its template again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Parts = Field(default_factory=list)
    content: Parts | None = None
    encrypted_content: str | None = Field(None, description="Not read: there is none of ours.")
    status: Status | None = None


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _check_item(item: Any) -> Any:
    if not isinstance(item, dict):
        raise PydanticCustomError("not_accepted", "must be an object")
    kind = item.get("type")
    if isinstance(kind, str) and kind not in KINDS:
        raise PydanticCustomError(
            "not_accepted",
            "'{kind}' is not supported: an item is one of {known}",
            {"kind": kind[:80], "known": ", ".join(KINDS)},
        )
    return {**item, "type": "message"} if kind is None else item


def _kind_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"a {kind}" if isinstance(kind, str) and kind in KINDS else "a message"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[FunctionCallItem, Tag("a function_call")]
    | Annotated[FunctionCallOutputItem, Tag("a function_call_output")]
    | Annotated[ReasoningItem, Tag("a reasoning")],
    Discriminator(_kind_of_item),
    BeforeValidator(_check_item),
]


def num_parts(items: Iterable[Item]) -> int:
    """Parts that the contents of items have, all together."""
    lists = (value for item in items for value in vars(item).values())
    return sum(len(parts) for parts in lists if isinstance(parts, list))


def _check_pieces(items: Any) -> Any:
    """Bound what the items consist of, all together, before anything is made of it."""
    if isinstance(items, list) and len(items) <= MAX_ITEMS:
        lists = (
            item.get(name)
            for item in items
            if isinstance(item, dict)
            for name in ("content", "output", "summary")
        )
        if sum(len(parts) for parts in lists if isinstance(parts, list)) > MAX_ITEMS:
            raise PydanticCustomError(
                "not_accepted", "may have {most} content parts all together", {"most": MAX_ITEMS}
            )
    return items


Items = Annotated[
    list[AnyItem], Field(max_length=MAX_ITEMS), FAIL_FAST, BeforeValidator(_check_pieces)
]
STORED_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[AnyItem])


def text_of(content: Content) -> str:
    """The text of an item's content; parts are lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
