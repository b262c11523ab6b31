"""A server on a port of the loopback whose model says what a script has."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from nanovllm.text.input_processor import TextInput
from tests.fake_llm import FakeLLM, FakeStream
from tests.server_client import build
from tests.serving import free_port

TEMPLATES = Path(__file__).parent / "unit" / "chat_templates"
START_TIMEOUT = 30.0


class ScriptedLLM(FakeLLM):
    """Says what its script makes of the prompt, one request at a time.

    Args:
        script: What to say to a prompt.
        template: Name of the chat template.
    """

    def __init__(self, script: Callable[[str], str], template: str = "qwen2.5") -> None:
        super().__init__(max_model_len=8192)
        if self.tokenizer is None:
            raise RuntimeError("the bundled model has a tokenizer")
        text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        self.tokenizer.chat_templates["default"] = text
        self._script = script

    async def submit(self, inputs: Sequence[TextInput], **options: Any) -> list[FakeStream]:
        self.reply_ids = self.frontend.encode(self._script(inputs[0].prompt or ""))
        return await super().submit(inputs, **options)


@contextmanager
def serve_scripted(llm: FakeLLM, **options: Any) -> Iterator[str]:
    """Serve it in a thread for the length of a `with` block; yields the URL."""
    port = free_port()
    config = uvicorn.Config(build(llm, **options), port=port, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("the scripted server does not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
