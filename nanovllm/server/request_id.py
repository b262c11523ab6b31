"""What clients call their requests: the header `X-Request-Id`."""

import re
import uuid
from collections.abc import Mapping

from nanovllm.errors import InvalidRequestError

HEADER = "X-Request-Id"
PATTERN = re.compile("[!-~]{1,256}")
"""What can come back in a header."""


def request_id(headers: Mapping[str, str], given: str | None = None) -> str:
    """The client's name for its request, or else a new one.

    Args:
        headers: The request's.
        given: The name that its body has; the header wins.

    Raises:
        InvalidRequestError: The name is not one that we could send back.
    """
    name = headers.get(HEADER) or given
    if name is None:
        return uuid.uuid4().hex
    if not PATTERN.fullmatch(name):
        raise InvalidRequestError(
            f"{HEADER} must be 1 to 256 visible ASCII characters", "request_id"
        )
    return name
