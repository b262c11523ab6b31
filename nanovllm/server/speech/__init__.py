"""The API for speech: OpenAI's, and that of the family's engine for VoxCPM."""

from fastapi import APIRouter

from nanovllm.server.speech import loras, openai, prompts, voices

router = APIRouter()
for module in (openai, voices):
    router.include_router(module.router)
for module in (prompts, loras):
    router.include_router(module.router)
