"""A model's text side: its tokenizer, chat template, defaults and checks. No tensors here."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.models.model_config import ModelConfig, read_generation_config
from nanovllm.models.voxcpm.config import is_speech
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.conversations import as_templates_read
from nanovllm.text.embeddings import unsupported_pooling
from nanovllm.text.grammar_compiler import GrammarCompiler, Vocabulary
from nanovllm.text.input_processor import InputProcessor
from nanovllm.text.output_processor import OutputProcessor
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.validation import conformed

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
"""A chat message: `role`, `content`, and what else the model's template reads."""

GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}
"""Our sampling parameters that `generation_config.json` may set, and its names for them."""


class TextFrontend:
    """What turns a user's text into an engine's request, and its keys into text again.

    Args:
        directory: The checkpoint.
        config: Where else the tokenizer or the chat template come from.

    Attributes:
        grammars: Checks and compiles the forms that outputs may be asked to have.

    Raises:
        FileNotFoundError: The tokenizer or template that an option names does not exist.
        UnsupportedModelError: The checkpoint's files cannot be read.
    """

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        if is_speech(directory):
            raise UnsupportedModelError(
                f"{config.model_id} speaks, and does not write: load it with AsyncSpeech or "
                "VoxCPM.from_pretrained",
                "model",
            )
        self.model_config = ModelConfig.from_directory(directory)
        self.tokenizer = _load_tokenizer(directory, config)
        self.grammars = GrammarCompiler(self.vocabulary)
        self._generation_config = read_generation_config(directory)
        self._directory = directory

    def input_processor(self, max_model_len: int) -> InputProcessor:
        """Build what checks and tokenises the requests of an engine."""
        return InputProcessor(
            self.tokenizer,
            self.model_config.vocab_size,
            self._eos_token_ids(),
            max_model_len,
            self.grammars,
        )

    def output_processor(self) -> OutputProcessor:
        """Build what turns an engine's keys into outputs."""
        return OutputProcessor(self.tokenizer)

    def vocabulary(self) -> Vocabulary:
        """The tokens as grammars need them; made anew, so ask `grammars` for its own.

        Raises:
            InvalidRequestError: There is no tokenizer, or one that does not go with grammars.
        """
        return Vocabulary.of(
            self._require_tokenizer(), self.model_config.vocab_size, self._eos_token_ids()
        )

    def default_sampling_params(self) -> SamplingParams:
        """The defaults of vLLM, overridden by the checkpoint's `generation_config.json`.

        Raises:
            InvalidRequestError: That file has values outside their range.
        """
        stored = self._generation_config
        given = {ours: stored.get(theirs) for ours, theirs in GENERATION_DEFAULTS.items()}
        if stored.get("do_sample") is False:
            given["temperature"] = 0.0
        try:
            return SamplingParams(**{k: v for k, v in given.items() if v is not None})
        except InvalidRequestError as e:
            raise InvalidRequestError(f"the model's generation_config.json: {e}", e.param) from e

    def embedding_params(
        self, dimensions: int | None = None, truncate_prompt_tokens: int | None = None
    ) -> SamplingParams:
        """What is sampled where only the embedding matters: one token, which nobody sees.

        Args:
            dimensions: How many numbers of an embedding are wanted; None is all.
            truncate_prompt_tokens: Keep so many first tokens of a prompt, and the one that the
                tokenizer ends it with; -1 is as many as fit.

        Raises:
            InvalidRequestError: It does not have as many, or the model's embeddings are not the
                last token's hidden states.
        """
        if self._unsupported_pooling is not None:
            raise InvalidRequestError(
                f"this model's embeddings are made by {self._unsupported_pooling}, which is not "
                "supported: here they are the last token's hidden states",
                "model",
            )
        dimensions = conformed("dimensions", dimensions, int | None)
        hidden_size = self.model_config.hidden_size
        if dimensions is not None and not 1 <= dimensions <= hidden_size:
            raise InvalidRequestError(
                f"dimensions must be between 1 and {hidden_size}, which the model has, got "
                f"{dimensions}",
                "dimensions",
            )
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )

    @cached_property
    def _unsupported_pooling(self) -> str | None:
        return unsupported_pooling(self._directory)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt a conversation becomes by the model's chat template.

        Args:
            messages: The conversation, in OpenAI's form: content may be text or text parts, and
                arguments of calls may be objects or their JSON text.
            tools: JSON schemas of functions the model may call.
            documents: Texts for retrieval.
            chat_template: Jinja text in place of the model's own.
            add_generation_prompt: Whether to open a message of the assistant at the end.
            continue_final_message: Whether to leave the last message open.
            chat_template_kwargs: Whatever else the template reads, such as `enable_thinking`.

        Raises:
            InvalidRequestError: There is no template, or it refuses the conversation.
        """
        return self._require_tokenizer().apply_chat_template(
            as_templates_read(messages),
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **(chat_template_kwargs or {}),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._require_tokenizer().encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._require_tokenizer().decode(token_ids, skip_special_tokens)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "the model's directory has no tokenizer, so no chat template either: send token "
                "ids, or start the engine with tokenizer="
            )
        return self.tokenizer

    def _eos_token_ids(self) -> tuple[int, ...]:
        """The checkpoint's end-of-text ids and the tokenizer's, as far as the model has them."""
        own = self.tokenizer.eos_token_id if self.tokenizer else None
        given = (*self.model_config.eos_token_ids, *(() if own is None else (own,)))
        return tuple(i for i in given if 0 <= i < self.model_config.vocab_size)


def _load_tokenizer(directory: Path, config: EngineConfig) -> Tokenizer | None:
    """The tokenizer; a model without one takes token ids alone."""
    if config.tokenizer is not None:
        directory = Path(config.tokenizer).expanduser()
    try:
        return Tokenizer.from_directory(directory, config.chat_template)
    except FileNotFoundError as e:
        if config.tokenizer is not None or config.chat_template is not None:
            raise
        logger.warning("prompts must be token ids: %s", e)
        return None
