"""Ollama's API, for what it says of models and has them write; none are pulled or made."""

from fastapi import APIRouter

from nanovllm.server.ollama import chat, embed, models

router = APIRouter(tags=["Ollama"])
for module in (chat, embed, models):
    router.include_router(module.router)
