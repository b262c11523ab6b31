"""The OpenAI API for text, with vLLM's additions to it."""

from fastapi import APIRouter

from nanovllm.server.openai import abort, chat, completions, decisions, embeddings, loras, models

router = APIRouter()
for module in (chat, completions, decisions, embeddings, models, abort, loras):
    router.include_router(module.router)
