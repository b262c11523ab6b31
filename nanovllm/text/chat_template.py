"""Chat templates: found in a checkpoint, compiled once, rendered exactly as transformers does."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.config import RESERVED_TEMPLATE_NAMES
from nanovllm.errors import InvalidRequestError
from nanovllm.text.tokenizer_files import read_settings, read_text

MAX_COMPILED_TEMPLATES = 64
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
PROBE = "which content shows"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates of a checkpoint by name.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` win over the `chat_template` of
    `tokenizer_config.json`, and that over the `chat_template.json` of older processors.

    Args:
        directory: The checkpoint.
        config: Its `tokenizer_config.json`, as `read_settings` returns it.

    Returns:
        Templates by name, of which "default" and "tool_use" have a meaning; empty if it has none.

    Raises:
        UnsupportedModelError: A file is not UTF-8, or `chat_template.json` is of another shape.
    """
    files = {
        path.stem: read_text(path)
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    if (single := directory / "chat_template.jinja").is_file():
        files["default"] = read_text(single)
    if "default" in files:
        return files
    declared = config.get("chat_template")
    if declared is None:
        declared = read_settings(directory / "chat_template.json").get("chat_template")
    if isinstance(declared, str):
        return {"default": declared} | files
    return {entry["name"]: entry["template"] for entry in declared or []} | files


def load_chat_template(text_or_path: str) -> str:
    """Return a template that is given as Jinja text or as the path of a file.

    Raises:
        FileNotFoundError: It is neither.
        UnsupportedModelError: The file is not UTF-8.
    """
    if any(character in text_or_path for character in "{}\n"):
        return text_or_path
    path = Path(text_or_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"chat_template {text_or_path!r} is neither a file nor Jinja text (that would contain "
            "'{{' or '{%')"
        )
    return read_text(path)


def select_chat_template(templates: Mapping[str, str], with_tools: bool) -> str:
    """Pick "tool_use" for a request with tools if there is one, otherwise "default".

    Raises:
        InvalidRequestError: There is no template to pick.
    """
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    known = f"only one named {', '.join(sorted(templates))}" if templates else "none"
    raise InvalidRequestError(
        f"the model has no default chat template ({known}): start the engine with chat_template=, "
        "or send a prompt instead of messages",
        "messages",
    )


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation to the text of a prompt.

    Args:
        template: Jinja text.
        messages: The conversation; each has a "role" and mostly a "content".
        tools: JSON schemas of functions the model may call.
        documents: Texts for retrieval, each with "title" and "text".
        add_generation_prompt: Whether to open a message of the assistant at the end.
        continue_final_message: Whether to leave the last message open, for the model to go on.
        variables: Whatever else the template may refer to: special tokens by name,
            `enable_thinking` and the like.

    Returns:
        The prompt, special tokens spelled out.

    Raises:
        InvalidRequestError: The template is broken, refuses the conversation, or reaches for what
            the sandbox does not allow; or the arguments contradict each other.
    """
    variables = variables or {}
    if taken := sorted(RESERVED_TEMPLATE_NAMES & variables.keys()):
        raise InvalidRequestError(
            f"chat template variable {taken[0]!r} is an argument of its own", taken[0]
        )
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message needs add_generation_prompt=False: a message is either "
            "continued or begun",
            "continue_final_message",
        )
    chat = _chat(messages)
    final_text = _tag_final_message(chat) if continue_final_message else None
    compiled = _compile(template)
    try:
        text = compiled.render(
            **_plain(variables),
            messages=chat,
            tools=_plain(tools),
            documents=_plain(documents),
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as e:  # a template is a program: it may fail in any way Python knows
        kind = "" if type(e) is jinja2.TemplateError else f"{type(e).__name__}: "
        raise InvalidRequestError(f"chat template failed: {kind}{e}", "messages") from e
    return text if final_text is None else _cut_at_tag(text, final_text)


@lru_cache(maxsize=MAX_COMPILED_TEMPLATES)
def reads_only_parts(template: str, variables: frozenset[tuple[str, str]]) -> bool:
    """Whether a template passes over content that is text, and reads a list of parts (Llama Guard).

    Args:
        template: Jinja text.
        variables: Names and values of special tokens.
    """
    message = {"role": "user", "content": PROBE}
    for chat in ([message], [in_parts(message)]):
        try:
            text = render_chat_template(template, chat, variables=dict(variables))
        except InvalidRequestError:
            continue
        if PROBE in text:
            return chat != [message] and not re.search("""['"]type['"]""", text)
    return False


def in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose content, if it is text, is a part in OpenAI's form."""
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str):
        return message
    return {**message, "content": [{"type": "text", "text": text}]}


@lru_cache(maxsize=MAX_COMPILED_TEMPLATES)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise InvalidRequestError(
            f"chat template is not valid Jinja: line {e.lineno}: {e.message}", "chat_template"
        ) from e
    except RecursionError as e:
        raise InvalidRequestError("chat template is nested too deeply", "chat_template") from e


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, without underscored names, which the sandbox could trip over."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that a template can write namespace(self=...) as in Jinja's own.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot hold {name!r}: names must not begin with an underscore"
        )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _plain(value: Any) -> Any:
    """Copy a value into plain JSON types: methods of richer ones are no business of a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> dict[str, Any]:
    """Offer a message's reasoning under each name that templates read it by."""
    if not isinstance(message, dict):
        raise InvalidRequestError(f"a message must be an object, got {message!r}", "messages")
    named = (message[name] for name in REASONING_FIELDS if message.get(name) is not None)
    if (reasoning := next(named, None)) is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _chat(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as templates read it."""
    try:
        return [_with_reasoning(_plain(message)) for message in messages]
    except RecursionError as e:
        raise InvalidRequestError("a message is nested too deeply", "messages") from e


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text, and return that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + CONTINUE_TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            part["text"] = text + CONTINUE_TAG
            return text
    raise InvalidRequestError(
        "continue_final_message needs a last message with text to continue",
        "continue_final_message",
    )


def _cut_at_tag(text: str, final_text: str) -> str:
    """End a rendered chat where its last message ends, whether or not the template trims it."""
    tag = CONTINUE_TAG.strip()
    if final_text.strip() not in text or tag not in text:
        raise InvalidRequestError(
            "continue_final_message is not possible: the chat template does not keep the last "
            "message as it is",
            "continue_final_message",
        )
    end = text.rindex(tag)
    return text[:end] if text.startswith(CONTINUE_TAG, end) else text[:end].rstrip()
