"""Types of request fields: bounds that the OpenAPI document shows, refusals in plain words."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_STOP_LENGTH = 256
MAX_LIST_LENGTH = 1024


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


def _as_integers(value: Any, depth: int = 2) -> Any:
    if isinstance(value, list) and depth:
        return [_as_integers(item, depth - 1) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class WireModel(BaseModel):
    """What a client sends: JSON types as they are, no infinite numbers, unknown fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


WHOLE = WholeNumbers()
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]
NumTokens = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
NumLogprobs = Annotated[int, Field(ge=0, le=20), WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=1e6)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
"""Far enough to any side: what is close to zero or infinity makes logits that are no numbers."""
Text = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopString | list[StopString] | None,
    OrSay(f"must be a string of 1 to {MAX_STOP_LENGTH} characters or a list of such strings"),
]
BadWords = Annotated[list[StopString], Field(max_length=128)]
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,10}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(json_schema_extra={"additionalProperties": False}, max_length=MAX_LIST_LENGTH),
]
"""By token id, which JSON makes text."""
RequestId = Annotated[str, Field(pattern="^[!-~]{1,256}$")]
"""It comes back in a header."""
Off = Literal[False] | None
