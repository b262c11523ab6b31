"""`nanovllm serve`: a model behind an HTTP server."""

import sys
from dataclasses import replace

from nanovllm.cli.options import (
    DEFAULT_CONFIG,
    DEFAULT_POOL,
    DEFAULT_SERVER,
    Engine,
    Pool,
    Server,
)


def serve(
    model: str | None = None,
    /,
    *,
    server: Server = DEFAULT_SERVER,
    engine: Engine = DEFAULT_CONFIG,
    pool: Pool = DEFAULT_POOL,
) -> None:
    """Serve a model with OpenAI's API, and a playground for browsers.

    Args:
        model: Directory of a checkpoint or id of a hub repository, as `--model`; without one, the
            bundled demo model.
        server: The server.
        engine: The engine.
        pool: How many engines.
    """
    from nanovllm.server.serve import serve as run_server

    sys.exit(run_server(server, replace(engine, model=model or engine.model), pool))
