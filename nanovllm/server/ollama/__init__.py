"""Ollama's API, for what it says of models and has them write; none are pulled or made."""

import http
from typing import Any

from fastapi import APIRouter

from nanovllm.server.errors import ERROR_RESPONSES
from nanovllm.server.ollama import chat, models
from nanovllm.server.ollama.responses import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": http.HTTPStatus(int(status)).phrase}
    for status in ERROR_RESPONSES
}

router = APIRouter(tags=["Ollama"])
for module in (chat, models):
    router.include_router(module.router, responses=ERRORS)
