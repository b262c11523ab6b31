"""JSON as clients and models send it, read strictly."""

import gc
from typing import Any


def decode(text: bytes) -> Any:
    """Decode JSON without looking for garbage, which there is none of yet.

    CPython up to 3.11 would look through all of a million lists again and again: 0.3 s for 4 MiB.

    Raises:
        ValueError: It is not JSON as RFC 8259 has it.
        RecursionError: It is nested too deeply.
    """
    import msgspec  # which a machine for offline inference may lack

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as e:
        raise ValueError(str(e)) from e
    finally:
        if was_enabled:
            gc.enable()
