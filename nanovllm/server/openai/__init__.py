"""The OpenAI API for text, with vLLM's additions to it."""

from fastapi import APIRouter

from nanovllm.server.openai import abort, chat, completions, loras, models

router = APIRouter()
for module in (chat, completions, models, abort, loras):
    router.include_router(module.router)
