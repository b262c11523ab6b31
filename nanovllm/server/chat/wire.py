"""What requests of OpenAI's two APIs for conversations have in common."""

from typing import Annotated, Literal

from pydantic import Field

from nanovllm.server.fields import (
    WHOLE,
    BadWords,
    CacheSalt,
    Int64,
    LenientModel,
    LogitBias,
    ModelName,
    NumTokens,
    Penalty,
    Priority,
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


class SampledRequest(LenientModel):
    """What to sample, and for whom. Fields that OpenAI does not have are vLLM's.

    A field that is null counts as left out. Sampling fields that are left out are what the model's
    `generation_config.json` says.
    """

    model: ModelName = None
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
    priority: Priority = 0
    cache_salt: CacheSalt = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
