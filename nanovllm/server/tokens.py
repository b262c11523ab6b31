"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import Response
from pydantic import ConfigDict, Discriminator, Field, Tag, with_config
from typing_extensions import TypedDict

from nanovllm.errors import InvalidRequestError
from nanovllm.server.chat.prompt import render
from nanovllm.server.fields import (
    FAIL_FAST,
    MAX_TOKEN_IDS,
    WHOLE,
    OrSay,
    TokenId,
    WireModel,
)
from nanovllm.server.json_body import JSONRoute
from nanovllm.server.openai.conversation import template_request
from nanovllm.server.openai.requests import ChatTemplateOptions
from nanovllm.server.state import ServerState, State
from nanovllm.server.streaming import encode
from nanovllm.text.tokenizer import Tokenizer

router = APIRouter(route_class=JSONRoute, tags=["tokens"])

EITHER = OrSay("must be left out: send either prompt or messages")


class TokenizeTextRequest(WireModel):
    """A text to tokenise.

    Attributes:
        return_token_strs: Whether to spell out the tokens, as they are in the vocabulary.
    """

    model: str | None = None
    prompt: str
    messages: Annotated[None, EITHER] = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatTemplateOptions):
    """A conversation to render and tokenise.

    Attributes:
        return_token_strs: Whether to spell out the tokens, as they are in the vocabulary.
    """

    model: str | None = None
    prompt: Annotated[None, EITHER] = None
    return_token_strs: bool | None = False


def _kind(body: Any) -> str:
    # Names with a space, so that they are no part of the path in an error's `param`.
    is_chat = isinstance(body, Mapping) and body.get("messages") is not None
    return "a conversation" if is_chat else "a text"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("a text")]
    | Annotated[TokenizeChatRequest, Tag("a conversation")],
    Discriminator(_kind),
    Body(),
]


class Tokenized(TypedDict):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(WireModel):
    """Tokens to make a text of."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS), FAIL_FAST, WHOLE]


class Detokenized(TypedDict):
    """The text of tokens, special ones spelled out."""

    prompt: str


@with_config(ConfigDict(extra="allow"))
class TokenizerInfo(TypedDict):
    """What a client needs to render and count by itself; special tokens are there by name."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, state: State) -> Response:
    """Tokenise a text, or a conversation as `/v1/chat/completions` would."""
    state.check_model(body.model or None)
    if isinstance(body, TokenizeChatRequest):
        text = await render(state, template_request(body, state))
        add_special_tokens = bool(body.add_special_tokens)
    else:
        text, add_special_tokens = body.prompt, body.add_special_tokens is not False
    tokens = await state.llm.encode(text, add_special_tokens)
    token_strs = None
    if body.return_token_strs:
        token_strs = await asyncio.to_thread(_spelled, _tokenizer(state), tokens)
    tokenized: Tokenized = {
        "count": len(tokens),
        "max_model_len": state.llm.max_model_len,
        "tokens": tokens,
        "token_strs": token_strs,
    }
    # Written here: FastAPI would look at each of a million tokens first.
    return Response(encode(tokenized), media_type="application/json")


def _spelled(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.backend.id_to_token(token_id) or "" for token_id in token_ids]


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, state: State) -> Detokenized:
    """Turn token ids into text."""
    state.check_model(body.model or None)
    num_ids = _tokenizer(state).end_id
    if wrong := next((i for i in body.tokens if i >= num_ids), None):
        raise InvalidRequestError(
            f"token id {wrong} in tokens is out of range: the vocabulary has {num_ids} ids, 0 to "
            f"{num_ids - 1}",
            "tokens",
        )
    return {"prompt": await state.llm.decode(body.tokens, False)}


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(state: State) -> dict[str, Any]:
    """Describe the tokenizer: its special tokens and its chat template."""
    tokenizer = _tokenizer(state)
    named = {name: tokenizer.special_tokens.get(name) for name in TokenizerInfo.__annotations__}
    return (
        {name: text for name, text in named.items() if name.endswith("_token")}
        | tokenizer.special_tokens
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": state.llm.max_model_len,
            "chat_template": tokenizer.chat_templates.get("default"),
        }
    )


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.llm.tokenizer is None:
        raise InvalidRequestError("the model's directory has no tokenizer")
    return state.llm.tokenizer
