"""`nanovllm serve`: a model behind an HTTP server."""

import sys
from dataclasses import replace

from nanovllm.cli.options import (
    DEFAULT_CONFIG,
    DEFAULT_POOL,
    DEFAULT_SERVER,
    DEFAULT_SPEECH,
    Engine,
    Pool,
    Server,
    Speech,
)


def serve(
    model: str | None = None,
    /,
    *,
    server: Server = DEFAULT_SERVER,
    engine: Engine = DEFAULT_CONFIG,
    pool: Pool = DEFAULT_POOL,
    speech: Speech = DEFAULT_SPEECH,
) -> None:
    """Serve a text or speech model, or one of each, with OpenAI's API and a playground.

    Args:
        model: Directory of a checkpoint or id of a hub repository, as `--model`; without one, the
            bundled demo model. It may be one that writes or one that speaks.
        server: The server.
        engine: The engine.
        pool: How many engines.
        speech: A speech model beside it, and the voices.
    """
    from nanovllm.server.serve import serve as run_server

    sys.exit(run_server(server, replace(engine, model=model or engine.model), pool, speech))
