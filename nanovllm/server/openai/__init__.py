"""The OpenAI API for text, with vLLM's additions to it."""

from fastapi import APIRouter

from nanovllm.server.errors import ERROR_RESPONSES
from nanovllm.server.openai import abort, chat, completions, models

router = APIRouter()
for module in (chat, completions, models, abort):
    router.include_router(module.router, responses=ERROR_RESPONSES)
