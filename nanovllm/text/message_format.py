"""How a model writes its messages: what thoughts and calls look like, and how to read them."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.text.call_grammars import (
    CallStyle,
    hermes,
    llama3_json,
    mistral,
    mistral_v11,
    pythonic,
    qwen3_coder,
)
from nanovllm.text.grammars import MAX_COMPOSED_SIZE, ComposedGrammar, quoted, token_name
from nanovllm.text.json_schemas import check_schema
from nanovllm.text.message_grammars import message_grammar, thoughts_rules
from nanovllm.text.message_parser import MessageParser
from nanovllm.text.parsers.calls import CallParser, Function
from nanovllm.text.parsers.json_calls import HermesParser, Llama3JsonParser, MistralParser
from nanovllm.text.parsers.pythonic import PythonicParser
from nanovllm.text.parsers.qwen3_coder import Qwen3CoderParser
from nanovllm.text.parsers.thoughts import ThoughtMarks
from nanovllm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A way to write calls.

    Args:
        parser: Reads them.
        style: Writes them down as a grammar.
        others: Strings that occur around calls, besides the parser's.
    """

    parser: type[CallParser]
    style: CallStyle
    others: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return self.parser.marks + self.parser.ignored + self.others


THINK = ThoughtMarks("<think>", "</think>")
REASONING_PARSERS: dict[str, ThoughtMarks | None] = {
    "deepseek_r1": ThoughtMarks("<think>", "</think>", always=True),
    "mistral": ThoughtMarks("[THINK]", "[/THINK]"),
    "none": None,
    "qwen3": THINK,
}
TOOL_CALL_PARSERS = {
    "hermes": CallFormat(HermesParser, hermes),
    "llama3_json": CallFormat(Llama3JsonParser, llama3_json),
    "llama4_json": CallFormat(Llama3JsonParser, llama3_json),
    "llama4_pythonic": CallFormat(PythonicParser, pythonic),
    "mistral": CallFormat(MistralParser, mistral),
    "pythonic": CallFormat(PythonicParser, pythonic),
    "qwen3_coder": CallFormat(Qwen3CoderParser, qwen3_coder),
    "qwen3_xml": CallFormat(Qwen3CoderParser, qwen3_coder),
}
MISTRAL_V11 = CallFormat(MistralParser, mistral_v11, ("[ARGS]", "[CALL_ID]"))

END_MARKS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "</s>")
"""Tokens that end a message, and need not be those that end a text."""

DEEPSEEK = "\uff5cAssistant\uff5c"
"""What DeepSeek's templates begin the model's messages with."""

MAX_TOOLS_SIZE = 2 * MAX_COMPOSED_SIZE
"""Characters of parameters, of which descriptions do not go into the grammar."""

MAX_TAIL = 32768
"""Characters at the end of a prompt in which the beginning of its last message is looked for."""


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How a model writes its messages.

    Args:
        calls: How it calls tools.
        thoughts: How it marks thoughts; None if it has none.
        special_tokens: Ids of the tokenizer's special tokens by their text.
    """

    calls: CallFormat
    thoughts: ThoughtMarks | None
    special_tokens: Mapping[str, int]

    @classmethod
    def detect(
        cls,
        template: str | None,
        tokenizer: Tokenizer,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> "MessageFormat":
        """Find out how a model writes.

        Args:
            template: Its chat template, for conversations with tools if it has one of these.
            tokenizer: Its tokenizer.
            tool_call_parser: One of `TOOL_CALL_PARSERS`; None goes by the template, and is
                "hermes" where that says nothing.
            reasoning_parser: One of `REASONING_PARSERS`; None goes by the template.

        Raises:
            InvalidRequestError: There is no parser of that name.
        """
        template = template or ""
        special = {t.content: i for i, t in tokenizer.added_tokens.items() if t.special}
        name = tool_call_parser or _detect_calls(template, special)
        if name is None:
            name = "hermes"
            if "tool" in template:
                logger.warning(
                    "the chat template knows tools, but not how the model calls them in a way "
                    "that we know: taking it for %r; see --tool-call-parser",
                    name,
                )
        calls = TOOL_CALL_PARSERS[_known(name, TOOL_CALL_PARSERS, "tool_call_parser")]
        # A template of older calls has the last word on a tokenizer of newer ones.
        told = template if "[TOOL_CALLS]" in template else special
        if calls.parser is MistralParser and "[ARGS]" in told:
            calls = MISTRAL_V11
        reasoning = reasoning_parser or _detect_reasoning(template)
        _known(reasoning, REASONING_PARSERS, "reasoning_parser")
        return cls(calls, REASONING_PARSERS[reasoning], special)

    @property
    def needs_special_tokens(self) -> bool:
        """Whether text without special tokens would lack what tells its parts apart."""
        return any(mark in self.special_tokens for mark in self._marks)

    @property
    def _marks(self) -> tuple[str, ...]:
        thoughts = self.thoughts
        return self.calls.marks + (() if thoughts is None else (thoughts.begin, thoughts.end))

    def parser(
        self,
        prompt: str,
        *,
        tools: bool,
        reasoning: bool,
        parallel: bool = True,
        only_calls: bool = False,
        functions: Sequence[Function] = (),
    ) -> MessageParser:
        """Make a parser for one message.

        Args:
            prompt: What the message goes on from; it may have begun the thoughts.
            tools: Whether to look for calls.
            reasoning: Whether to tell thoughts from the answer.
            parallel: Whether there may be more than one call; if not, the others are left out.
            only_calls: Whether the model has to call, so that what it ends with is none cut short.
            functions: What may be called; some models' arguments mean what these say.
        """
        thoughts = self.thoughts if reasoning else None
        begun = reasoning and self.begins_with_thoughts(prompt)
        dropped = tuple(mark for mark in END_MARKS if mark in self.special_tokens)
        if not tools:
            # Without tools these mean nothing, and nobody asked to see them.
            marks = (mark for mark in self.calls.marks if mark in self.special_tokens)
            return MessageParser(thoughts, begun, None, (*dropped, *marks))
        calls = self.calls.parser(dropped, functions)
        return MessageParser(thoughts, begun, calls, parallel=parallel, only_calls=only_calls)

    def begins_with_thoughts(self, prompt: str) -> bool:
        """Whether what goes on from a prompt begins within a thought."""
        if self.thoughts is None:
            return False
        state = self._thinking(prompt)
        return state == "begun" or (self.thoughts.always and state != "ended")

    def constrain(
        self,
        answer: StructuredOutputsParams | None,
        functions: Sequence[Function],
        *,
        forced: bool,
        parallel: bool,
        prompt: str,
        thinking: bool,
    ) -> StructuredOutputsParams | None:
        """Return the form of a whole message: thoughts, then calls or an answer.

        A message without calls and thoughts has the form of the answer. One that may call functions
        of which none is strict, and has an answer of no form, has none.

        Args:
            answer: The form of the answer; None for any text.
            functions: What may be called; only those with `strict` bind the model of its own
                accord, all do where it has to call.
            forced: Whether it has to call; there are functions then.
            parallel: Whether there may be more than one call.
            prompt: What the message goes on from; it may have begun or ended the thoughts.
            thinking: Whether the model may begin to think.

        Raises:
            InvalidRequestError: A function cannot be written down as a grammar.
        """
        free = answer is None and not forced
        if free and not any(function.get("strict") for function in functions):
            return None
        _check_size([f for f in functions if f.get("strict") or not free])
        thoughts = self._thoughts_rules(prompt, thinking)
        if not thoughts and not functions:
            return answer
        message = message_grammar(
            self.calls.style(functions, self._mark, not free) if functions else None,
            None if forced else answer,
            self._mark,
            special_tokens=self.special_tokens,
            parallel=parallel,
            free=free,
            never="" if self.thoughts is None else re.escape(self.thoughts.begin),
        )
        start = "thoughts message" if thoughts else "message"
        grammar = f"start: {start}\n{thoughts}{message}"
        if functions and len(grammar) > MAX_COMPOSED_SIZE:
            raise _too_large(len(grammar), MAX_COMPOSED_SIZE)
        return ComposedGrammar(grammar=grammar)

    def _mark(self, text: str) -> str:
        """Name a string in Lark, which takes special tokens for no characters."""
        token_id = self.special_tokens.get(text)
        return quoted(text) if token_id is None else token_name(token_id)

    def _thoughts_rules(self, prompt: str, thinking: bool) -> str:
        """Lark's rules for `thoughts`, "" if there are none."""
        if self.thoughts is None:
            return ""
        begun = self.begins_with_thoughts(prompt)
        may_begin = thinking and self._thinking(prompt) == "unknown"
        if not (begun or may_begin):
            return ""
        return thoughts_rules(self.thoughts, self._mark, must_end=begun, may_begin=may_begin)

    def _thinking(self, prompt: str) -> Literal["begun", "ended", "unknown"]:
        """Tell what the prompt says of the thoughts of the message that it ends in.

        What other messages say about thoughts, such as how to mark them, tells nothing: between
        them and the end there is a special token.
        """
        if self.thoughts is None:
            return "unknown"
        begin, end = self.thoughts.begin, self.thoughts.end
        tail = prompt[-MAX_TAIL:]
        found = max(tail.rfind(begin), tail.rfind(end))
        if found < 0:
            return "unknown"
        state: Literal["begun", "ended"] = "ended" if tail.startswith(end, found) else "begun"
        behind = tail[found + len(end if state == "ended" else begin) :]
        if not behind.strip():
            return state
        others = [text for text in self.special_tokens if text not in (begin, end)]
        begins_here = any(text in tail[:found] for text in others)
        return state if begins_here and not any(text in behind for text in others) else "unknown"


def _check_size(functions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse schemas too large for a grammar, before seconds are spent on writing one.

    Raises:
        InvalidRequestError: They are.
    """
    for function in functions:
        try:
            check_schema(function.get("parameters"))
        except InvalidRequestError as e:
            raise InvalidRequestError(f"{function['name']}: {e}", "tools") from e
    size = len(msgspec.json.encode([function.get("parameters") for function in functions]))
    if size > MAX_TOOLS_SIZE:
        raise _too_large(size, MAX_TOOLS_SIZE)


def _too_large(size: int, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"tools: the parameters that bind the model have {size} characters, more than the {most} "
        "we take: make them smaller or fewer, or leave it to the model with tool_choice 'auto' "
        "and without 'strict'",
        "tools",
    )


def _known(name: str, known: Mapping[str, object], param: str) -> str:
    if name not in known:
        raise InvalidRequestError(
            f"{param} {name!r} is unknown: it is one of {', '.join(sorted(known))}", param
        )
    return name


def _detect_calls(template: str, special_tokens: Mapping[str, int]) -> str | None:
    """Tell by the words of a template how the model calls tools; None if it has none we know."""
    if "[TOOL_CALLS]" in template or "[TOOL_CALLS]" in special_tokens:
        return "mistral"
    if "<tool_call>" in template and "<function=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template and "<arg_key>" not in template:
        return "hermes"
    if "[func_name1(" in template or re.search(r"name\s*\+\s*['\"]\(['\"]", template):
        return "pythonic"
    if "<|python_tag|>" in template or "'\"parameters\": '" in template:
        return "llama3_json"
    return None


def _detect_reasoning(template: str) -> str:
    if "[THINK]" in template:
        return "mistral"
    if "<think>" not in template and "</think>" not in template:
        return "none"
    # DeepSeek's R1 thinks always; of V3.1 the template has a switch, and says what is on.
    return "deepseek_r1" if DEEPSEEK in template and "thinking" not in template else "qwen3"
