"""Voices on disk: a recording each, and beside it a text file with what is said in it."""

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple
from unicodedata import category

from nanovllm.audio.files import MAX_FILE_BYTES
from nanovllm.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_TEXT_CHARS = 4096
NAME = r"^[\w-]([\w .-]{0,62}[\w-])?$"
"""What a voice may be called; without look-around, which not all regular expressions have."""
NAME_RULE = (
    "a voice's name has 1 to 64 letters, digits, spaces and any of ._-, and neither begins nor "
    "ends with a space or a dot"
)
_NAME = re.compile(NAME)
_MAX_NAME_BYTES = 240
"""Of a file's name, which has a suffix besides."""
_JOINERS = "\u200c\u200d"
_SUFFIXES = {
    b"RIFF": ".wav",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
    b"\xff\xfb": ".mp3",
    b"\xff\xf3": ".mp3",
    b"\xff\xf2": ".mp3",
}
"""What a kept recording may begin with, and how its file is called."""


class VoiceFile(NamedTuple):
    """A recording on disk, and what is said in it, "" if nobody wrote it down."""

    path: Path
    text: str


class VoiceDirectory:
    """The voices of a directory, by the names of their files, as it was when it was opened.

    Args:
        path: The directory.

    Raises:
        FileNotFoundError: It does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        if not self._path.is_dir():
            raise FileNotFoundError(f"the directory of voices does not exist: {path}")
        self._files: dict[str, VoiceFile] = {}
        for file in sorted(self._path.iterdir()):
            if file.suffix.lower() in _SUFFIXES.values() and file.is_file():
                self._take(file)

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def find(self, name: str) -> VoiceFile | None:
        """The voice of a name; one that was removed and added again is another object."""
        return self._files.get(name)

    def read(self, voice: VoiceFile) -> bytes:
        """The bytes of a recording.

        Raises:
            InvalidRequestError: It cannot be read any more.
        """
        try:
            with voice.path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except OSError as e:
            name = voice.path.stem
            logger.error("cannot read the voice %r: %s", name, e)
            raise InvalidRequestError(f"the recording of voice {name!r} cannot be read") from e

    def check_new(self, name: str, data: bytes) -> None:
        """Refuse what cannot be added.

        Raises:
            InvalidRequestError: The name is taken or not allowed, or the recording in a format that
                is not kept.
        """
        if not _is_name(name):
            raise InvalidRequestError(f"{NAME_RULE}; got {name!r:.80}", "name")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise InvalidRequestError(
                f"a voice that is kept has a name of {_MAX_NAME_BYTES} bytes at most", "name"
            )
        if name in self._files:
            raise InvalidRequestError(f"there is a voice {name!r} already: remove it first", "name")
        for suffix in (".txt", *_SUFFIXES.values()):
            if os.path.lexists(self._path / (name + suffix)):
                raise InvalidRequestError(
                    f"the directory of voices has a file {name + suffix!r} already, which is no "
                    "voice of this server's: remove it first",
                    "name",
                )
        _suffix(data)

    def add(self, name: str, data: bytes, text: str) -> None:
        """Write a voice that `check_new` let pass.

        Raises:
            OSError: It cannot be written.
        """
        path, text_path = self._path / (name + _suffix(data)), self._path / f"{name}.txt"
        # The recording last: a text alone is no voice.
        _write(text_path, text.encode())
        try:
            _write(path, data)
        except OSError:
            text_path.unlink()
            raise
        self._files[name] = VoiceFile(path, text)

    def remove(self, name: str) -> None:
        """Delete a voice's files.

        Raises:
            OSError: They cannot be deleted.
        """
        path = self._files.pop(name).path
        (self._path / f"{name}.txt").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _take(self, file: Path) -> None:
        name = file.stem
        if not _is_name(name) or name in self._files:
            logger.warning("%s is left out: its name is taken, or no name for a voice", file)
            return
        try:
            with file.with_name(f"{name}.txt").open("rb") as text_file:
                text = text_file.read(MAX_FILE_BYTES).decode("utf-8-sig").strip()
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as e:
            logger.warning("%s is left out: its text cannot be read: %s", file, e)
            return
        if len(text) > MAX_TEXT_CHARS:
            logger.warning("%s is left out: its text has over %d characters", file, MAX_TEXT_CHARS)
            return
        self._files[name] = VoiceFile(file, text)


def _is_name(name: str) -> bool:
    """Whether a voice may be called so; marks on letters and what joins them count as letters."""
    letters = ("a" if category(c)[0] == "M" or c in _JOINERS else c for c in name)
    return _NAME.fullmatch("".join(letters)) is not None


def _suffix(data: bytes) -> str:
    for start, suffix in _SUFFIXES.items():
        if data.startswith(start):
            return suffix
    raise InvalidRequestError("a voice that is kept must be a WAV, FLAC, MP3 or Ogg file")


def _write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
