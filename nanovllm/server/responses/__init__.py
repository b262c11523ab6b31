"""OpenAI's Responses API."""

from fastapi import APIRouter

from nanovllm.server.responses import create, input_tokens, stored

router = APIRouter()
for module in (create, input_tokens, stored):
    router.include_router(module.router)
