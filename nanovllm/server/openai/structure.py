"""The form that an answer is to have, in OpenAI's words, vLLM's and SGLang's."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.fields import FAIL_FAST, MAX_LIST_LENGTH, Off, WireModel, not_served

JSONText = dict[str, Any] | str
"""A JSON schema, as an object or as its text."""
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_LIST_LENGTH), FAIL_FAST]
ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
"""Older names of vLLM's, and SGLang's, for the fields of `structured_outputs`."""
ONE_SPACING = not_served("JSON is written with one space behind a colon or a comma")

NO_CHANGE = not_served("a schema is followed as it is; have additionalProperties=false in it")


class NamedSchema(WireModel):
    """A schema and what it is called.

    Attributes:
        strict: It is always followed to the letter.
    """

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """What the answer is: text as it comes, any JSON object, or JSON that follows a schema.

    A `structural_tag` has its own fields beside `type`.

    Attributes:
        schema_: Where other servers than OpenAI's have the schema.
    """

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def params(self) -> StructuredOutputsParams | None:
        """The same for the engine; None is text.

        Raises:
            InvalidRequestError: There is no schema.
        """
        if self.type == "text":
            return None
        if self.type == "structural_tag":
            return StructuredOutputsParams(structural_tag=self.model_dump(exclude_none=True))
        named = None if self.json_schema is None else self.json_schema.schema_
        schema = self.schema_ if named is None else named
        if schema is not None:
            return StructuredOutputsParams(json=schema)
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        raise InvalidRequestError(
            "response_format.json_schema.schema: must be the JSON schema of the answer; for any "
            'JSON object, response_format is {"type": "json_object"}',
            "response_format.json_schema.schema",
        )


class StructuredOutputs(WireModel):
    """What vLLM calls it: exactly one of these."""

    json_: JSONText | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="Lark's or llama.cpp's notation.")
    json_object: bool | None = None
    structural_tag: JSONText | None = None
    whitespace_pattern: Annotated[None, ONE_SPACING] = None
    disable_additional_properties: Annotated[Off, NO_CHANGE] = None

    def params(self) -> StructuredOutputsParams:
        """The same for the engine.

        Raises:
            InvalidRequestError: It is not exactly one.
        """
        return StructuredOutputsParams(
            json=self.json_,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=self.json_object,
            structural_tag=self.structural_tag,
        )


class StructureFields(WireModel):
    """All the ways to ask for a form, of which a request may go one."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONText | None = Field(None, description="As `structured_outputs.json`.")
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    guided_choice: Choices | None = Field(None, description="As `structured_outputs.choice`.")
    guided_grammar: str | None = Field(None, description="As `structured_outputs.grammar`.")
    guided_whitespace_pattern: Annotated[None, ONE_SPACING] = None
    json_schema: JSONText | None = Field(None, description="As `structured_outputs.json`.")
    regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    ebnf: str | None = Field(None, description="As `structured_outputs.grammar`.")

    def structure(self) -> tuple[str, StructuredOutputsParams] | None:
        """The field that asks for a form, and the form; None is text as it comes.

        Raises:
            InvalidRequestError: More than one does, or one is empty.
        """
        asked = list(self._asked())
        if len(asked) > 1:
            names = " and ".join(name for name, _ in asked)
            raise InvalidRequestError(
                f"{names} exclude each other: an answer has one form", asked[1][0]
            )
        return asked[0] if asked else None

    def _asked(self) -> Iterator[tuple[str, StructuredOutputsParams]]:
        form = self.response_format
        if form is not None and (params := form.params()) is not None:
            yield "response_format", params
        if (outputs := self.structured_outputs) is not None:
            yield "structured_outputs", outputs.params()
        for name, kind in ALIASES.items():
            if (value := getattr(self, name)) is not None:
                yield name, StructuredOutputsParams(**{kind: value})
