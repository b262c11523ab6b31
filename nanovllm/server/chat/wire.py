"""What requests of OpenAI's two APIs for conversations have in common."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from nanovllm.server.fields import (
    WHOLE,
    BadWords,
    Int64,
    LogitBias,
    NumTokens,
    Penalty,
    RepetitionPenalty,
    Share,
    Stop,
    Temperature,
    WireModel,
)

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]


class RefusalPart(WireModel):
    """What a message of the assistant says in place of an answer."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


class SampledRequest(WireModel):
    """What to sample, and for whom. Fields that OpenAI does not have are vLLM's.

    A field that is null counts as left out. Sampling fields that are left out are what the model's
    `generation_config.json` says.
    """

    # Fields we do not know have no effect; they are kept for a line in the log.
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="A served name; left out, it is the only model.")
    stream: bool | None = False
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Int64 | None = None
    stop: Stop = None
    min_tokens: NumTokens | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    priority: Int64 | None = Field(0, description="Lower runs first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
