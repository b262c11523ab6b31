"""Bodies of type multipart/form-data, as forms and file uploads are (RFC 7578)."""

from collections.abc import Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple

from nanovllm.errors import InvalidRequestError

MAX_PARTS = 64
MAX_HEADS_SIZE = 8 << 10
"""Of all parts' headers together: the standard library takes quadratic time to read them."""


class Part(NamedTuple):
    """A field of a form.

    Args:
        name: What it is called.
        filename: The name of the file that it is, if it is one; the sender's words.
        content: Its bytes.
    """

    name: str
    filename: str | None
    content: bytes

    @property
    def text(self) -> str:
        """The content of a field that is no file.

        Raises:
            InvalidRequestError: It is not UTF-8.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError as e:
            raise InvalidRequestError(
                f"{self.name}: must be UTF-8 text: {e.reason} at byte {e.start}", self.name
            ) from e


def read_form(content_type: str, body: bytes) -> dict[str, Part]:
    """The fields of a form by name; of several of one name the last.

    Args:
        content_type: The header of that name, which has the boundary.
        body: The whole body.

    Raises:
        InvalidRequestError: It is no such body.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary("")
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise InvalidRequestError("the body must be JSON or multipart/form-data with a boundary")
    return {part.name: part for part in _parts(body, boundary.encode("latin-1", "replace"))}


def _parts(body: bytes, boundary: bytes) -> Iterator[Part]:
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 1)
    if len(pieces) > MAX_PARTS + 1 or not any(piece.startswith(b"--") for piece in pieces[1:]):
        raise InvalidRequestError(
            f"the form is cut off, or has more than {MAX_PARTS} fields", "body"
        )
    heads_size = 0
    for piece in pieces[1:]:
        if piece.startswith(b"--"):
            return
        head, _, content = piece.partition(b"\r\n\r\n")
        heads_size += len(head)
        if heads_size > MAX_HEADS_SIZE:
            raise InvalidRequestError(
                f"the headers of the form's parts exceed {MAX_HEADS_SIZE} bytes", "body"
            )
        fields = BytesHeaderParser().parsebytes(head.lstrip())
        name = fields.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise InvalidRequestError("a part of the form has no name", "body")
        yield Part(name, fields.get_filename(), content)
