"""Answers that are given as a whole, in one piece, when all of it is there."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from nanovllm.async_engine import in_thread_if
from nanovllm.server.errors import in_words_of_client
from nanovllm.server.request_id import HEADER, request_id
from nanovllm.server.streaming import encode, unless_gone

T = TypeVar("T")

LONG_ANSWER = 1 << 15
"""Numbers from which an answer is written in a thread; so many take 5 ms."""


async def respond(
    http: Request,
    given_id: str | None,
    fields: Mapping[str, str],
    work: Callable[[str], Awaitable[T]],
    num_numbers: Callable[[T], int],
    tell: Callable[[T], object],
) -> Response:
    """Do what is asked and answer; a client that leaves ends the work.

    Args:
        http: The connection the request came by.
        given_id: What the client calls its request, unless a header says it.
        fields: The client's names for our arguments, for errors.
        work: Does it, under the name that the client knows the request by.
        num_numbers: How many numbers there are in the answer.
        tell: Makes its body.

    Raises:
        InvalidRequestError: The request cannot be used.
        UnavailableError: The server is too busy, or its engine died.
        APIError: The same in HTTP's terms.
    """
    name = request_id(http.headers, given_id)

    async def answer() -> Response:
        with in_words_of_client(fields):
            done = await work(name)
        content = await in_thread_if(num_numbers(done) >= LONG_ANSWER, lambda: encode(tell(done)))
        return Response(content, media_type="application/json", headers={HEADER: name})

    return await unless_gone(http, answer())
