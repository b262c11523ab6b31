"""What requests of all dialects are held to."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from nanovllm.config import ServerConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.server.fields import LenientModel

logger = logging.getLogger(__name__)

FORMS = frozenset({"structured_outputs", *(f.name for f in fields(StructuredOutputsParams))})
"""What errors of an answer's form name."""


def note_ignored(*requests: LenientModel) -> None:
    """Log which fields have no effect, and let go of what they say: it may be much."""
    for request in requests:
        if request.model_extra:
            logger.debug("fields without effect in a request: %.500r", list(request.model_extra))
            request.model_extra.clear()


def check_stop(stop: str | list[str] | None, config: ServerConfig, param: str = "stop") -> None:
    """Refuse more stop strings than a request may have.

    Raises:
        InvalidRequestError: There are more.
    """
    most = config.max_stop_strings
    if isinstance(stop, list) and len(stop) > most:
        raise InvalidRequestError(f"a request may have {most} stop strings, got {len(stop)}", param)


@contextmanager
def form_asked_for_by(field: str | None) -> Iterator[None]:
    """Blame a form that cannot be had on the field of the request that asked for it.

    Args:
        field: Its path; None is none.

    Raises:
        InvalidRequestError: There is such an error, or another one.
    """
    try:
        yield
    except InvalidRequestError as e:
        if field is None or e.param not in FORMS:
            raise
        raise InvalidRequestError(f"{field}: {e}", field) from e
