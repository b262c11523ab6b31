"""The tokenizer of a speech model, which reads Chinese character by character."""

from pathlib import Path

import tokenizers

from nanovllm.errors import InvalidRequestError, UnsupportedModelError

SPACE_MARK = "▁"
UNKNOWN = "<unk>"


class SpeechTokenizer:
    """Encodes what is to be spoken, without a begin-of-text id.

    Tokens of several Chinese characters are split into one token a character, as in training.

    Args:
        backend: What does the rest.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        unknown = vocab.get(UNKNOWN, 0)
        self._backend = backend
        self._characters = {
            token_id: [vocab.get(character, unknown) for character in word]
            for token, token_id in vocab.items()
            if _is_chinese(word := token.replace(SPACE_MARK, "")) and word in vocab
        }
        self.max_token_chars = max(map(len, vocab))

    @classmethod
    def from_directory(cls, directory: Path) -> "SpeechTokenizer":
        """Read a checkpoint's `tokenizer.json`.

        Raises:
            FileNotFoundError: There is none.
            UnsupportedModelError: It cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {directory}: a speech model needs one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing more specific
            raise UnsupportedModelError(f"{path} is not a tokenizer: {e}") from e
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequestError: The text is no valid Unicode.
        """
        try:
            # A batch of one: unlike a single text, it lets other threads run meanwhile.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except TypeError as e:  # what the library makes of lone surrogates
            raise InvalidRequestError("the text is not valid Unicode", "text") from e
        split = self._characters
        return [part for token_id in encoding.ids for part in split.get(token_id, (token_id,))]


def _is_chinese(word: str) -> bool:
    """Whether a word has several characters, all of them Chinese."""
    return len(word) >= 2 and all("\u4e00" <= character <= "\u9fff" for character in word)
