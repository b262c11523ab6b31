"""Types of request fields: bounds that the OpenAPI document shows, refusals in plain words."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from nanovllm.config.server import MAX_PROMPTS

MAX_STOP_LENGTH = 256
MAX_LIST_LENGTH = 1024
MAX_TOKEN_IDS = 1 << 20
"""Ids in a list: more than a context or a vocabulary has, and checked in some 0.05 s."""


@dataclass(frozen=True)
class OrSay:
    """Replaces what pydantic says of a wrong value, a sentence for each member of a union.

    Args:
        message: What a value has to be, or why there is nothing to choose.
    """

    message: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as e:
            raise PydanticCustomError("not_accepted", "{why}", {"why": self.message}) from e


def not_served(why: str) -> OrSay:
    """Refuse, by name, all but the values that ask for what we do anyway."""
    return OrSay(f"not supported: {why}")


def by_type(default: str, *others: str, or_string: bool = False) -> Discriminator:
    """Tell the models of a union apart by the `type` of an object.

    Their tags are "type text" and the like: what has a space is no part of the path in an error.

    Args:
        default: The type that an object is taken for which has none of the others.
        others: The other types.
        or_string: Whether there is a member for strings, too; its tag is "a string".
    """

    def tag_of(value: Any) -> str:
        if or_string and isinstance(value, str):
            return "a string"
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"type {kind if kind in others else default}"

    return Discriminator(tag_of)


def only_types(kinds: Collection[str], refusal: str) -> BeforeValidator:
    """Refuse an object of any other `type`, before its fields are looked at.

    Args:
        kinds: The types that there are.
        refusal: What to say; `{kind}` in it is the type that the object has.
    """

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            raise PydanticCustomError("not_accepted", refusal, {"kind": kind[:80]})
        return value

    return BeforeValidator(check)


def bounded(names: Collection[str], most: int, what: str) -> BeforeValidator:
    """Bound what the objects of a list consist of, all together, before anything is made of it.

    Args:
        names: The fields of an object that are lists.
        most: How many items these lists may have.
        what: What the items are, for the error.
    """

    def check(objects: Any) -> Any:
        if isinstance(objects, list) and len(objects) <= most:
            lists = (item.get(name) for item in objects if isinstance(item, dict) for name in names)
            if sum(len(items) for items in lists if isinstance(items, list)) > most:
                raise PydanticCustomError(
                    "not_accepted",
                    "may have {most} {what} all together",
                    {"most": most, "what": what},
                )
        return objects

    return BeforeValidator(check)


@dataclass(frozen=True)
class WholeNumbers:
    """Takes 16.0 for the integer 16, as JSON does, also in lists and in lists of those.

    Strictness stays: no text and no truth value is a number. What needs no change costs nothing.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return handler(_as_integers(value))


@dataclass(frozen=True)
class FirstErrorOnly:
    """Ends a list's validation at its first wrong item; every list of a request needs it.

    An error for each item, of which a body has a million, takes 10 s. Unlike pydantic's `FailFast`
    it can be hashed, as the members of a union must be.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return {**handler(source), "fail_fast": True}


def _as_integers(value: Any, depth: int = 2) -> Any:
    if not isinstance(value, list):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    # A hostile list is long; the types of its items are had at a tenth of the price.
    kinds = set(map(type, value))
    if float in kinds and len(value) <= MAX_TOKEN_IDS:
        return [int(v) if type(v) is float and v.is_integer() else v for v in value]
    if list in kinds and len(value) <= MAX_PROMPTS and depth > 1:
        return [_as_integers(item, depth - 1) for item in value]
    return value


def _refuse_true(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


class WireModel(BaseModel):
    """What a client sends: JSON types as they are, no infinite numbers, unknown fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class LenientModel(WireModel):
    """A request whose unknown fields are kept for a line in the log: see `note_ignored`."""

    model_config = ConfigDict(extra="allow")


WHOLE = WholeNumbers()
FAIL_FAST = FirstErrorOnly()
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]
NumTokens = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS), FAIL_FAST]
NumLogprobs = Annotated[int, Field(ge=0, le=20), WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=1e6)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
"""Far enough to any side: what is close to zero or infinity makes logits that are no numbers."""
Text = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_LIST_LENGTH), FAIL_FAST] | None,
    OrSay(f"must be a string of 1 to {MAX_STOP_LENGTH} characters or a list of such strings"),
]
BadWords = Annotated[list[StopString], Field(max_length=128), FAIL_FAST]
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,10}$"), OrSay("is not a token id")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(json_schema_extra={"additionalProperties": False}, max_length=MAX_LIST_LENGTH),
    FAIL_FAST,
]
"""By token id, which JSON makes text."""
ModelName = Annotated[
    str | None, Field(description="A served name; left out, it is the only model.")
]
Priority = Annotated[Int64 | None, Field(description="Lower runs first.")]
CacheSalt = Annotated[
    Annotated[str, Field(min_length=1, max_length=1024)] | None,
    Field(description="Share cached prefixes only with requests of the same salt."),
]
TruncateTo = Annotated[TokenCount | Literal[-1] | None, OrSay("must be at least 1, or -1")]
RequestId = Annotated[str, Field(pattern="^[!-~]{1,256}$")]
"""It comes back in a header."""
Off = Annotated[bool, AfterValidator(_refuse_true), WithJsonSchema({"const": False})] | None
"""Not `Literal[False]`, which takes 0 too."""
