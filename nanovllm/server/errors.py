"""Errors on the wire: one body for all of them, and the status that each of ours has."""

import copy
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from nanovllm.errors import InvalidRequestError, UnavailableError

MAX_MESSAGE_CHARS = 2000
"""Messages may repeat what a client sent; more than this helps nobody."""

MAX_COMPLAINTS = 64
"""Each is looked for in the body; where there are more, the first ones tell enough."""

INTERNAL_ERROR = "internal error; the server's log has it"
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away before there was an answer; in metrics only."""

HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "url_too_long",
    415: "unsupported_media_type",
    431: "headers_too_large",
}


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str = Field(description="What is wrong and what would be right.")
    type: str = Field(description="Kind of error, such as `invalid_request_error`.")
    param: str | None = Field(description="The offending field, as a dotted path.")
    code: str | None = Field(description="What a program may branch on.")


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorInfo


class APIError(HTTPException):
    """An error that knows its status and body.

    Args:
        status: HTTP status.
        message: What is wrong and what would be right.
        type: Kind of error.
        param: The offending field, if one is to blame.
        code: What a program may branch on.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",  # noqa: A002  # the name it has on the wire
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message[:MAX_MESSAGE_CHARS], headers)
        self.message = self.detail
        self.type = type
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, **more: Any) -> Response:
        """The response; `more` goes beside `error` in its body."""
        return self.response_with(self.body() | more)

    def response_with(self, body: Mapping[str, Any]) -> Response:
        """The response with a body of another shape."""
        # Escaped, because a message may repeat half a surrogate pair, which has no UTF-8.
        content = json.dumps(body, ensure_ascii=True)
        return Response(content, self.status_code, self.headers, media_type="application/json")


@contextmanager
def in_words_of_client(fields: Mapping[str, str]) -> Iterator[None]:
    """Blame what cannot be used on the field that the client knows it by.

    Args:
        fields: Its fields, by the names of our own arguments.

    Raises:
        InvalidRequestError: Something cannot be used.
    """
    try:
        yield
    except InvalidRequestError as e:
        if e.param is None or e.param not in fields:
            raise
        told = copy.copy(e)  # others may be waiting for the same one
        told.param = fields[e.param]
        raise told from e


class BrokenStreamError(Exception):
    """An answer that can neither go on nor say so: its connection is to be broken off."""


def to_api_error(e: BaseException) -> APIError:
    """The error that a client is told of an exception, without our internals."""
    if isinstance(e, APIError):
        return e
    if isinstance(e, RequestValidationError):
        return _from_validation(e)
    if isinstance(e, InvalidRequestError):
        return APIError(400, str(e), e.type, e.param, e.code)
    if isinstance(e, UnavailableError):
        retry_after = {"Retry-After": str(max(1, math.ceil(e.retry_after)))}
        return APIError(503, str(e), e.type, None, e.code, retry_after)
    if isinstance(e, HTTPException):
        code = HTTP_CODES.get(e.status_code)
        return APIError(e.status_code, str(e.detail), code=code, headers=e.headers)
    return APIError(500, INTERNAL_ERROR, "internal_error")


def _from_validation(e: RequestValidationError) -> APIError:
    """Name the field that is wrong, and say what it should be."""
    found = e.errors()[:MAX_COMPLAINTS]
    if found[0]["type"] == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {found[0]['ctx']['error']}")
    complaints = [(_path(error, e.body), _says(error)) for error in found]
    # Each member of a union complains; the one that got furthest is likely to be meant.
    path = max((path for path, _ in complaints), key=len)
    if not path:
        return APIError(400, _says_of_body(e.body))
    name = ".".join(map(str, path))
    messages = dict.fromkeys(message for at, message in complaints if at == path)
    return APIError(400, f"{name}: {', or '.join(messages)}", param=name)


def _says(error: Mapping[str, Any]) -> str:
    if error["type"] == "too_short" and not error["ctx"]["actual_length"]:
        return "must not be empty"
    return str(error["msg"])


def _says_of_body(body: Any) -> str:
    if body is None:
        return "the request needs a body: a JSON object, sent as application/json"
    if isinstance(body, bytes):
        return "the body must be JSON, sent with the header Content-Type: application/json"
    return "the body must be a JSON object"


def _path(error: Mapping[str, Any], body: Any) -> list[int | str]:
    """Where in the body an error is, without the union members that pydantic names on the way."""
    where: str
    location: list[int | str]
    where, *location = error["loc"]
    if where != "body":
        return location
    path: list[int | str] = []
    for part in location:
        if part in _keys(body):
            body = body[part]
        elif error["type"] != "missing" or part != location[-1]:
            continue
        path.append(part)
    return path


def _keys(value: Any) -> Collection[int | str]:
    if isinstance(value, dict):
        return value
    return range(len(value)) if isinstance(value, list) else ()
