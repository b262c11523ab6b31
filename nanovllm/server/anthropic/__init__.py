"""Anthropic's Messages API."""

from nanovllm.server.anthropic.messages import router

__all__ = ["router"]
