"""The items of a conversation as clients send them to `/v1/responses`."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from nanovllm.server.chat.wire import RefusalPart
from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_LIST_LENGTH,
    WireModel,
    bounded,
    by_type,
    only_types,
)
from nanovllm.server.responses.objects import ItemStatus

MAX_ITEMS = 1 << 13
"""Items and parts of them, all together; checked in some 0.05 s."""

TEXT_KINDS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class TextPart(WireModel):
    """A piece of text, under any of the names that the API has for one."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


Part = Annotated[
    Annotated[TextPart, Tag("type text")] | Annotated[RefusalPart, Tag("type refusal")],
    by_type("text", "refusal"),
    only_types(
        (*TEXT_KINDS, "refusal"), "'{kind}' is not supported: this model reads and writes text"
    ),
]
Parts = Annotated[list[Part], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST]
Content = str | Parts


class MessageItem(WireModel):
    """A message, of the client's or one that was answered before."""

    type: Literal["message"] | None = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    status: ItemStatus | None = None


class FunctionCallItem(WireModel):
    """A call of the model's."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: str
    name: str
    arguments: str
    status: ItemStatus | None = None


class FunctionCallOutputItem(WireModel):
    """What the function gave back."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str
    output: Content
    status: ItemStatus | None = None


class ReasoningItem(WireModel):
    """What the model thought: `content`, or else the `summary`, is shown to its template again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Parts = Field(default_factory=list)
    content: Parts | None = None
    encrypted_content: str | None = Field(None, description="Not read: there is none of ours.")
    status: ItemStatus | None = None


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _as_item(item: Any) -> Any:
    if not isinstance(item, dict):
        raise PydanticCustomError("not_accepted", "must be an object")
    return {**item, "type": "message"} if item.get("type") is None else item


AnyItem = Annotated[
    Annotated[MessageItem, Tag("type message")]
    | Annotated[FunctionCallItem, Tag("type function_call")]
    | Annotated[FunctionCallOutputItem, Tag("type function_call_output")]
    | Annotated[ReasoningItem, Tag("type reasoning")],
    by_type(*KINDS),
    only_types(KINDS, f"'{{kind}}' is not supported: an item is one of {', '.join(KINDS)}"),
    BeforeValidator(_as_item),
]


def num_parts(items: Iterable[Item]) -> int:
    """Parts that the contents of items have, all together."""
    lists = (value for item in items for value in vars(item).values())
    return sum(len(parts) for parts in lists if isinstance(parts, list))


Items = Annotated[
    list[AnyItem],
    Field(max_length=MAX_ITEMS),
    FAIL_FAST,
    bounded(("content", "output", "summary"), MAX_ITEMS, "content parts"),
]
STORED_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[AnyItem])


def text_of(content: Content) -> str:
    """The text of an item's content; parts are lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
