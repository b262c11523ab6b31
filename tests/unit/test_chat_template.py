"""Chat templates: in the shapes that checkpoints have, rendered as transformers renders them."""

import json
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import jinja2
import pytest

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.text import chat_template as module
from nanovllm.text.chat_template import (
    MAX_COMPILED_TEMPLATES,
    load_chat_template,
    read_chat_templates,
    render_chat_template,
    select_chat_template,
)

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <b>now</b> & 'here' - in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "東京"}},
}
USER = {"role": "user", "content": " What is <b>1 & 1</b>? 你好 👩‍👩‍👧 \n"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo.", "reasoning": "sum"},
        {"role": "user", "content": "Sure?"},
    ],
    "answered": [USER, {"role": "assistant", "content": "Two. \n", "reasoning_content": "1+1"}],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 21}'},
        {"role": "tool", "content": "raw"},
        {"role": "assistant", "content": "21 °C"},
        {"role": "user", "content": "Thanks"},
    ],
    "many calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    "empty": [],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True, "tools": [TOOL, TOOL]},
    {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 Jan 2030"},
    {"continue_final_message": True, "documents": [{"title": "T", "text": "x"}]},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ARGUMENTS = ("tools", "documents", "add_generation_prompt", "continue_final_message")


def ours(template: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    arguments = {name: value for name, value in options.items() if name in ARGUMENTS}
    variables = SPECIAL | {k: v for k, v in options.items() if k not in ARGUMENTS}
    try:
        return render_chat_template(template, chat, variables=variables, **arguments)
    except InvalidRequestError:
        return None


def theirs(template: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    try:
        rendered, _ = utils.render_jinja_template(
            conversations=[chat], chat_template=template, **options, **SPECIAL
        )
    except (jinja2.TemplateError, AttributeError, IndexError, TypeError, ValueError):
        return None
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "tools", "no thinking", "continue"])
def test_equals_transformers(name: str, options: dict[str, Any]) -> None:
    for case, chat in CHATS.items():
        before = json.dumps(chat)
        text = ours(TEMPLATES[name], chat, options)
        assert text == theirs(TEMPLATES[name], chat, options), case
        assert json.dumps(chat) == before


def test_most_cases_render() -> None:
    """The comparison above would hold if everything failed alike."""
    texts = [
        ours(template, chat, options)
        for template in TEMPLATES.values()
        for chat in CHATS.values()
        for options in OPTIONS
    ]
    assert len(TEMPLATES) >= 14
    assert sum(text is not None for text in texts) > len(texts) * 0.6


def test_multimodal_content_and_rich_values() -> None:
    class Role(str, Enum):
        USER = "user"

    chat = [{"role": Role.USER, "content": ({"type": "text", "text": "hi"}, {"x": object()})}]
    template = "{{ messages | tojson }}"
    expected = '[{"role": "user", "content": [{"type": "text", "text": "hi"}, {"x": "<object>"}]}]'
    assert ours(template, chat, {}) == theirs(template, chat, {}) == expected
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "he"}]}]
    parts = "{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}"
    assert ours(parts, chat, {"continue_final_message": True}) == "he"


def test_the_date_is_today() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}"
    today = {str(datetime.now().date())}
    text = ours(template, [USER], {})
    assert text == theirs(template, [USER], {})
    assert text in today | {str(datetime.now().date())}


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ dict.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(10000000) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    """Reaching for Python ends the request, or at most yields nothing."""
    try:
        text = render_chat_template(template, [USER])
    except InvalidRequestError:
        return
    assert not any(word in text for word in ("class", "object", "function", "root", "module"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", r"not valid Jinja: line 1"),
        ("{{ raise_exception('no system role') }}", r"^chat template failed: no system role$"),
        ("{{ messages[0].content + 1 }}", r"TypeError"),
        ("{{ a.b.c }}", r"UndefinedError: 'a' is undefined"),
        ("{{ 1 // 0 }}", r"ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"RecursionError"),
        ("{{ ''.__class__.x }}", r"SecurityError"),
    ],
)
def test_errors_say_what_happened(template: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        render_chat_template(template, [USER])


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda: render_chat_template("", [USER], variables={"messages": []}), "messages"),
        (lambda: render_chat_template("", ["hi"]), "messages"),  # type: ignore[list-item]
        (
            lambda: render_chat_template(
                "", [USER], continue_final_message=True, add_generation_prompt=True
            ),
            "continue_final_message",
        ),
        (
            lambda: render_chat_template("gone", [USER], continue_final_message=True),
            "continue_final_message",
        ),
        (lambda: select_chat_template({}, False), "messages"),
        (lambda: select_chat_template({"rag": ""}, True), "messages"),
    ],
)
def test_contradictions_are_refused(call: Callable[[], str], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        call()
    assert caught.value.param == param


def test_calls_that_are_nested_too_deeply() -> None:
    arguments: Any = 1
    for _ in range(900):
        arguments = {"a": arguments}
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        render_chat_template("", [{"role": "assistant", "content": "", "tool_calls": calls}])


def test_the_cache_is_bounded() -> None:
    for i in range(MAX_COMPILED_TEMPLATES + 20):
        assert render_chat_template(f"{{# #}}{i}", [USER]) == str(i)
    assert module._compile.cache_info().currsize == MAX_COMPILED_TEMPLATES


def test_where_templates_are_read_from(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path, {}) == {}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_chat_templates(tmp_path, {}) == {"default": "json"}
    assert read_chat_templates(tmp_path, {"chat_template": "config"}) == {"default": "config"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    templates = read_chat_templates(tmp_path, {"chat_template": named})
    assert templates == {"default": "a", "tool_use": "b"}
    assert select_chat_template(templates, with_tools=True) == "b"
    assert select_chat_template(templates, with_tools=False) == "a"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert read_chat_templates(tmp_path, {"chat_template": named}) == templates | {"rag": "rag"}
    (tmp_path / "chat_template.jinja").write_text("file")
    expected = {"default": "file", "rag": "rag"}
    assert read_chat_templates(tmp_path, {"chat_template": named}) == expected


def test_a_template_is_text_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert load_chat_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"
    assert load_chat_template("{{ x }}") == "{{ x }}"
    with pytest.raises(FileNotFoundError, match="neither a file nor Jinja"):
        load_chat_template(str(tmp_path / "missing.jinja"))
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UnsupportedModelError, match=r"mine.jinja is not UTF-8"):
        load_chat_template(str(tmp_path / "mine.jinja"))
