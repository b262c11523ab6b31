"""Ollama's API, for what it says of models and has them write; none are pulled or made."""

from fastapi import APIRouter

from nanovllm.server.ollama import chat, models

router = APIRouter(tags=["Ollama"])
for module in (chat, models):
    router.include_router(module.router)
