"""Options of the HTTP server."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nanovllm.config.options import Options
from nanovllm.errors import InvalidRequestError

MAX_PROMPTS = 1 << 14
"""What is checked in some 0.05 s; the default is far less."""

RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "documents",
        "messages",
        "tokenize",
        "tools",
    }
)
"""What a chat template reads, or a request says, under these names is nobody's to set besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(Options):
    """What the HTTP server listens on, whom it serves, and what it takes at most.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        uds: Path of a Unix socket to listen on instead.
        ssl_keyfile: Private key for TLS; None is the one in `ssl_certfile`.
        ssl_certfile: Certificate for TLS.
        root_path: Path below which a proxy serves us.
        served_model_name: Names that requests may use; the first is the one that responses have.
            None is the model's own.
        api_key: Keys, one of which a request has to bring; None lets everybody in.
        admin_key: Key for what changes the server, such as its LoRA adapters; None lets nobody.
        lora_dir: Directory below which the adapters lie that may be loaded while it serves.
        lora_modules: LoRA adapters to begin with, each `name=path`, or an object of "name", "path"
            and perhaps "base_model_name"; requests name them as their model.
        allowed_origins: Origins that browsers may call from; none by default.
        default_chat_template_kwargs: JSON object of what chat templates read besides the
            messages, such as `{"enable_thinking": false}`.
        chat_template_kwarg_names: Names a request may set in `chat_template_kwargs`.
        tool_call_parser: How the model writes calls: "hermes", "llama3_json", "mistral",
            "pythonic" or "qwen3_coder"; None is what its chat template tells.
        reasoning_parser: How it writes what it thinks: "deepseek_r1", "mistral" or "qwen3", or
            "none" to take it for text; None is what its chat template tells.
        enable_auto_tool_choice: Without effect, as a model with tools may always call them; vLLM
            has to be told.
        max_body_size: Bytes of a request's body.
        max_audio_body_size: The same for requests that may bring a recording.
        max_headers: Headers of a request.
        max_header_size: Bytes of a request line and its headers.
        request_timeout: Seconds a client may take to send a request.
        keep_alive_timeout: Seconds an idle connection is kept open. Less than a client keeps it for
            (httpx 5, aiohttp 15), and its next request may meet the end of it.
        max_n: Completions of one prompt.
        max_prompts: Prompts in one request, at most 16384.
        max_stop_strings: Stop strings, of at most 256 characters, in one request.
        max_stored_bytes: Bytes of responses that `/v1/responses` keeps for clients that go on from
            them; 0 keeps none.
        sse_keep_alive_interval: Seconds without news after which a stream sends a comment.
        shutdown_timeout: Seconds that running requests get to end after SIGTERM.
        zmq_control: Whether to open the control socket.
        zmq_control_endpoint: Its address.
        log_format: "text", or "json" for one JSON object a line.
        log_level: "debug", "info", "warning" or "error".
        access_log: Whether every request is logged.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    root_path: str = ""
    served_model_name: list[str] | None = None
    api_key: list[str] | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    lora_dir: str | None = None
    lora_modules: list[str] | None = None
    allowed_origins: list[str] | None = None
    default_chat_template_kwargs: str | None = None
    chat_template_kwarg_names: list[str] | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = False
    max_body_size: int = 4 << 20
    max_audio_body_size: int = 16 << 20
    max_headers: int = 256
    max_header_size: int = 64 << 10
    request_timeout: float = 30.0
    keep_alive_timeout: float = 20.0
    max_n: int = 128
    max_prompts: int = 128
    max_stop_strings: int = 16
    max_stored_bytes: int = 64 << 20
    sse_keep_alive_interval: float = 15.0
    shutdown_timeout: float = 30.0
    zmq_control: bool = False
    zmq_control_endpoint: str = "tcp://127.0.0.1:5557"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = False

    environment_aliases: ClassVar[Mapping[str, str]] = {
        "VLLM_API_KEY": "api_key",
        "LOG_LEVEL": "log_level",
        "ZMQ_CONTROL": "zmq_control",
        "ZMQ_CONTROL_ENDPOINT": "zmq_control_endpoint",
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_level", str(self.log_level).lower())
        self._check_types()
        self._check_range(0, "port", high=65535)
        self._check_range(1, "max_body_size", "max_audio_body_size", "max_headers")
        self._check_range(1, "max_header_size", "max_n", "max_stop_strings")
        self._check_range(1, "max_prompts", high=MAX_PROMPTS)
        self._check_range(0.001, "request_timeout", "keep_alive_timeout")
        self._check_range(0.001, "sse_keep_alive_interval")
        self._check_range(0, "shutdown_timeout", "max_stored_bytes")
        if any(not key for key in self.api_key or []):
            raise InvalidRequestError("api_key must not be empty", "api_key")
        if self.admin_key == "":
            raise InvalidRequestError("admin_key must not be empty", "admin_key")
        self._check_template_kwargs()
        if self.served_model_name is not None and not all(self.served_model_name):
            raise InvalidRequestError("served_model_name must not be empty", "served_model_name")

    def _check_template_kwargs(self) -> None:
        name = "default_chat_template_kwargs"
        kwargs = _json(self.default_chat_template_kwargs or "{}")
        if not isinstance(kwargs, dict):
            raise InvalidRequestError(
                f"{name} must be a JSON object, got {self.default_chat_template_kwargs!r}", name
            )
        if reserved := sorted(RESERVED_TEMPLATE_NAMES & kwargs.keys()):
            raise InvalidRequestError(
                f"{name} must not have {reserved[0]!r}: it comes from each request", name
            )


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None
