"""Text to token ids and back, all at once or as the ids arrive."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.text.chat_template import (
    in_parts,
    load_chat_template,
    read_chat_templates,
    reads_only_parts,
    render_chat_template,
    select_chat_template,
)
from nanovllm.text.tokenizer_files import read_settings

REPLACEMENT = "\ufffd"
"""What a decoder makes of bytes that are no UTF-8, so also of half a character."""

LONG_TEXT = 4096
"""Characters from which it matters that other threads go on: encoding a batch lets them, encoding
a single text does not."""


class Tokenizer:
    """A checkpoint's tokenizer, its special tokens by name and its chat templates.

    It encodes and decodes as its `tokenizer.json` says, which is what `transformers.AutoTokenizer`
    does, without importing transformers. Only for some classes, such as `LlamaTokenizer` and
    `GemmaTokenizer`, transformers 5 builds another pipeline than that of the file, and encodes text
    behind a special token in another way; here, as in transformers 4, the file counts.

    Args:
        backend: What does the work.
        special_tokens: Text of the special tokens by name: "bos_token", "eos_token" and the like.
        chat_templates: Jinja text by name, as `read_chat_templates` returns it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_directory(cls, path: Path, chat_template: str | None = None) -> "Tokenizer":
        """Read the tokenizer of a checkpoint.

        Args:
            path: Directory with `tokenizer.json`, or with files that transformers can convert.
            chat_template: Jinja text, or the path of a file, in place of the checkpoint's own.

        Raises:
            FileNotFoundError: There is no tokenizer in the directory, or no such template.
            ImportError: It takes transformers to read this tokenizer, which is not installed.
            UnsupportedModelError: The files are there but cannot be read.
        """
        config = read_settings(path / "tokenizer_config.json")
        file = path / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as e:  # the library raises nothing more specific
                raise UnsupportedModelError(f"{file} is not a tokenizer: {e}") from e
            special_tokens = _add_tokens(backend, path, config)
            backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        else:
            backend, special_tokens = _convert_with_transformers(path)
        backend.no_truncation()
        backend.no_padding()
        if chat_template is None:
            templates = read_chat_templates(path, config)
        else:
            templates = {"default": load_chat_template(chat_template)}
        return cls(backend, special_tokens, templates)

    def encode(self, text: str, add_special_tokens: bool = True, param: str = "text") -> list[int]:
        """Encode a text.

        Args:
            text: Any.
            add_special_tokens: Whether the tokenizer puts its own around it.
            param: What to blame in errors.

        Raises:
            InvalidRequestError: It is no text, or has half a surrogate pair.
        """
        try:
            if len(text) >= LONG_TEXT:
                return self.encode_batch([text], add_special_tokens)[0]
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as e:  # also what the library makes of half a pair
            raise InvalidRequestError(
                f"{param} must be valid Unicode text, got {text!r:.80}", param
            ) from e
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Encode several texts, on several cores where the library may."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode ids to text; ids beyond the vocabulary decode to nothing."""
        known = [token_id for token_id in token_ids if 0 <= token_id < self.end_id]
        text: str = self.backend.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Return the text of one token as it reads in the middle of a text, special or not.

        Part of a character reads as U+FFFD.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            prefix = self.decode(self.anchor)
            text = self.decode([*self.anchor, token_id], skip_special_tokens=False)[len(prefix) :]
            self._token_texts[token_id] = text
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Render a conversation to the text of a prompt, to be encoded without special tokens.

        Args:
            messages: The conversation. A template that reads parts of content and nothing else gets
                text as a part.
            tools: JSON schemas of functions the model may call.
            documents: Texts for retrieval.
            chat_template: Jinja text in place of the tokenizer's own.
            add_generation_prompt: Whether to open a message of the assistant at the end.
            continue_final_message: Whether to leave the last message open.
            **variables: Whatever else the template may refer to, such as `enable_thinking`.

        Raises:
            InvalidRequestError: There is no template, or it does not take this conversation.
        """
        template = chat_template or select_chat_template(self.chat_templates, tools is not None)
        named = (
            (name, text) for name, text in self.special_tokens.items() if isinstance(text, str)
        )
        if reads_only_parts(template, frozenset(named)):
            messages = [in_parts(message) for message in messages]
        return render_chat_template(
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=self.special_tokens | variables,
        )

    @cached_property
    def end_id(self) -> int:
        """One past the highest id, which is more than `vocab_size` where ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token; byte-level tokens count a character a byte."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Tokens that are matched before the text is split, special ones among them."""
        added: dict[int, AddedToken] = self.backend.get_added_tokens_decoder()
        return added

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return frozenset(i for i, token in self.added_tokens.items() if token.special)

    @cached_property
    def anchor(self) -> list[int]:
        """A plain word for a decoder to start from, so that the next one keeps its space."""
        for word in "aeo":
            ids = [i for i in self.encode(word, add_special_tokens=False) if i < self.end_id]
            if self.decode(ids) == word:
                return ids
        return []

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = None if text is None else self.backend.token_to_id(text)
        return token_id


class Detokenizer:
    """Decodes one sequence as its ids arrive.

    The pieces join to what the whole sequence decodes to behind its prompt. Bytes that may yet
    become a character are held back, so no piece ends in half of one; if the sequence ends before
    the character does, that half is never returned. Bytes that cannot become a character any more
    are U+FFFD, as in `Tokenizer.decode`.

    Args:
        tokenizer: The tokenizer of the ids.
        prompt_token_ids: What precedes the sequence; only the last few are looked at.
        skip_special_tokens: Whether special tokens are left out.
        spaces_between_special_tokens: Whether added tokens that follow each other keep the space
            that some decoders put between words; only read if special tokens are not left out.
    """

    MAX_PENDING = 64
    """Ids held back at most, as each step decodes them all; no character takes more than 4."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend
        self._end_id = tokenizer.end_id
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._glued = (
            {}
            if skip_special_tokens or spaces_between_special_tokens
            else {i: token.content for i, token in tokenizer.added_tokens.items()}
        )
        self._last_was_glued = False
        self._pending: list[int] = []
        self._echo = ""
        self._prime(prompt_token_ids)

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, often none."""
        if token_id in self._skipped or not 0 <= token_id < self._end_id:
            return ""
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as e:  # the library raises nothing more specific
            if "Invalid prefix" not in str(e):
                raise
            text = self._restart(token_id)
        if text is None:
            text = self._hold(token_id)
        elif self._pending:
            text = self._release(text)
        if self._glued:
            text = self._glue(token_id, text)
        return text

    def _prime(self, prompt_token_ids: Sequence[int]) -> None:
        """Start behind the prompt, from the shortest of its tails that is whole characters.

        A prompt may end in half a character. Those ids are pushed as if they were generated, and
        `_echo` is what they read as so far: text of the prompt, not of the sequence.
        """
        for size in (8, 32, 128):
            tail = prompt_token_ids[-size:]
            for num_dangling in range(min(4, len(tail) + 1)):
                head = tail[: len(tail) - num_dangling]
                text = self._decode(head)
                if REPLACEMENT not in text and (text or size >= len(prompt_token_ids)):
                    self._start(head, tail[len(head) :])
                    self._echo = self._decode_behind_anchor(self._pending)
                    return
        self._start(self._tokenizer.anchor, prompt_token_ids[-3:])
        self._echo = self._decode_behind_anchor(self._pending)

    def _start(self, head: Sequence[int], dangling: Sequence[int] = ()) -> None:
        """Start behind the text of `head`, with ids that complete no character yet."""
        self._stream = DecodeStream(list(head), self._skip_special_tokens)
        self._pending.clear()
        for token_id in dangling:
            self.push(token_id)

    def _hold(self, token_id: int) -> str:
        """Keep an id that completed nothing, unless there are too many of them already."""
        pending = self._pending
        pending.append(token_id)
        if len(pending) <= self.MAX_PENDING:
            return ""
        # All of it is U+FFFD, real ones or wrong bytes. A cut inside a real one makes more of them.
        heads = [pending[: len(pending) - num_kept] for num_kept in range(4)]
        text, head = min(
            ((self._decode_behind_anchor(head), head) for head in heads),
            key=lambda candidate: len(candidate[0]),
        )
        self._start(self._tokenizer.anchor, pending[len(head) :])
        return self._without_echo(text)

    def _release(self, text: str) -> str:
        """Return text that ids held back have become."""
        self._pending.clear()
        return self._without_echo(text)

    def _without_echo(self, text: str) -> str:
        """Take off what belongs to the prompt; its half a character may have become another."""
        echo, self._echo = self._echo, ""
        shared = 0
        while shared < min(len(echo), len(text)) and echo[shared] == text[shared]:
            shared += 1
        return text[shared:]

    def _restart(self, token_id: int) -> str | None:
        """Go on behind an id that changed text already returned; ids held back are lost.

        A run of byte tokens decodes to characters or, if any byte of it is wrong, to as many
        U+FFFD, so it may change after the fact, and `DecodeStream` gives up.
        """
        self._echo = ""
        self._start(self._tokenizer.anchor)
        text: str | None = self._stream.step(self._backend, token_id)
        return text

    def _glue(self, token_id: int, text: str) -> str:
        """Replace the text of an added token by its bare content if it follows another one."""
        content = self._glued.get(token_id)
        follows, self._last_was_glued = self._last_was_glued, content is not None
        return content if content is not None and follows else text

    def _decode_behind_anchor(self, token_ids: Sequence[int]) -> str:
        anchor = self._tokenizer.anchor
        return self._decode([*anchor, *token_ids])[len(self._decode(anchor)) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)


def _add_tokens(
    backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any]
) -> dict[str, str]:
    """Add the tokens that only the configuration declares, and return the special ones by name.

    `add_bos_token` and `add_eos_token` are deliberately not read: beside a `tokenizer.json` its
    post-processor decides, in transformers as here.
    """
    added = config.get("added_tokens_decoder")
    if added is not None:
        listed = sorted(added.items(), key=lambda item: int(item[0]))
        backend.add_tokens([AddedToken(**fields) for _, fields in listed])
        declared = dict(config)
    else:
        declared = dict(config) | read_settings(path / "special_tokens_map.json")
    extra = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        declared, extra = declared | dict(extra), []
    named = {
        name: text
        for name, value in declared.items()
        if name.endswith("_token") and (text := _token_content(value)) is not None
    }
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    wanted = dict.fromkeys([*named.values(), *map(_token_content, extra)])
    backend.add_special_tokens([text for text in wanted if text and text not in known])
    return named


def _token_content(value: Any) -> str | None:
    """Return the text of a token that is written as a string or as an object."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _convert_with_transformers(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Let transformers build the tokenizer from whatever older files there are."""
    names = ("tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "tekken.json")
    if not any((path / name).is_file() for name in names):
        raise FileNotFoundError(
            f"no tokenizer in {path}: expected tokenizer.json; name a directory that has one with "
            "tokenizer="
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise ImportError(
            f"{path} has no tokenizer.json; converting its older files needs transformers: "
            "pip install 'nanovllm[transformers]'"
        ) from e
    try:
        converted = AutoTokenizer.from_pretrained(str(path))
        backend = converted.backend_tokenizer
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as e:
        raise UnsupportedModelError(
            f"transformers cannot convert the tokenizer in {path}: {e}"
        ) from e
    return backend, converted.special_tokens_map
