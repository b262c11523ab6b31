"""`POST /api/chat` and `POST /api/generate`."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.server.ollama import requests as wire
from nanovllm.server.ollama.answer import LINES, ChatAnswer, GenerateAnswer
from nanovllm.server.ollama.responses import ChatResponse, GenerateResponse
from nanovllm.server.ollama.route import OllamaRoute
from nanovllm.server.state import State

router = APIRouter(route_class=OllamaRoute)


def _also_lines(whole: Any) -> dict[int | str, dict[str, Any]]:
    """Document a success that is a JSON object, or a line for each addition to one."""
    return {
        200: {
            "model": whole,
            "description": "The whole answer, or lines with what is added to it as it comes.",
            "content": {LINES: {"schema": {"type": "object"}}},
        }
    }


@router.post("/api/chat", response_model=ChatResponse, responses=_also_lines(ChatResponse))
async def chat(body: wire.ChatRequest, request: Request, state: State) -> Response:
    """Answer a conversation, by default as JSON lines."""
    return await ChatAnswer(body, request, state).respond()


@router.post(
    "/api/generate", response_model=GenerateResponse, responses=_also_lines(GenerateResponse)
)
async def generate(body: wire.GenerateRequest, request: Request, state: State) -> Response:
    """Answer a prompt, by default as JSON lines."""
    return await GenerateAnswer(body, request, state).respond()
