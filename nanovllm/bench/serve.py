"""The load test of a server with OpenAI's API: ours, vLLM's or anybody's."""

import asyncio
import itertools
import json
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from nanovllm.bench.http import HTTPClient
from nanovllm.bench.load import Target, error_message, run_load
from nanovllm.bench.machine import Machine, inspect_machine
from nanovllm.bench.serve_config import DEFAULT_OUTPUT_LEN, Load, ServeConfig, parse_slo
from nanovllm.bench.stats import LoadResult, summarize
from nanovllm.bench.workload import first
from nanovllm.errors import InvalidRequestError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServeResult:
    """Figures of each load, and what was measured with what.

    Args:
        server: URL, model and, if it says, version of the server.
        settings: Options of the test.
        loads: The figures.
        machine: What the client ran on.
    """

    server: dict[str, str]
    settings: dict[str, Any]
    loads: list[LoadResult]
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "server": self.server,
            "settings": self.settings,
            "loads": [load.to_dict() for load in self.loads],
            "machine": asdict(self.machine),
        }


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on uvloop, where there is one: the client costs a third less."""
    if sys.platform == "win32":
        return asyncio.run(coroutine)
    import uvloop

    return uvloop.run(coroutine)


async def run_serve(
    config: ServeConfig, on_done: Callable[[int], None] = lambda _: None
) -> ServeResult:
    """Warm the server up and put every load on it in turn.

    Args:
        config: What to do.
        on_done: Called after each request with how many have ended.

    Raises:
        OSError: No server answers.
        InvalidRequestError: The server refuses to be measured; the message has what it says.
    """
    keys = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    client = HTTPClient(config.url.rstrip("/").removesuffix("/v1"), keys)
    slo = parse_slo(config.slo) if config.slo else {}
    try:
        server = await _find_server(client, config)
        target = Target(client, PATHS[config.endpoint], config.timeout)
        await _warm_up(target, _bodies(config, server, config.num_warmups, "warm-up"))
        num_done = itertools.count(1)
        loads = []
        for index, load in enumerate(config.loads()):
            records, client_load = await run_load(
                target.ask,
                _bodies(config, server, config.num_requests, f"load {index}"),
                load,
                seed=config.seed,
                on_done=lambda: on_done(next(num_done)),
            )
            loads.append(summarize(records, client_load, load, slo))
    finally:
        client.close()
    return ServeResult(server, _settings(config, server), loads, inspect_machine())


async def _find_server(client: HTTPClient, config: ServeConfig) -> dict[str, str]:
    """Ask the server what it is; `version` is only there where it says."""
    try:
        status, body = await _get(client, "/version")
        server = {"url": config.url, "model": config.model or await _first_model(client)}
    except OSError as e:
        raise ConnectionError(f"no server answers at {config.url}: {e}") from e
    if status == 200:
        with suppress(ValueError, KeyError, TypeError):
            server["version"] = str(json.loads(body)["version"])
    return server


async def _first_model(client: HTTPClient) -> str:
    status, body = await _get(client, "/v1/models")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise InvalidRequestError(
            f"the server lists no model: HTTP {status}: {error_message(body)}", "model"
        ) from e


async def _get(client: HTTPClient, path: str) -> tuple[int, bytes]:
    async with client.send("GET", path) as response:
        return response.status, await response.read()


def _bodies(config: ServeConfig, server: dict[str, str], count: int, name: str) -> list[bytes]:
    """Requests of one load, drawn from a seed of its own: no load finds another's prefixes."""
    fields = {
        "model": server["model"],
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if _ignores_eos(config, server):
        fields["ignore_eos"] = True
    prompts = first(config.source(), count, f"{config.seed} {name}")
    is_chat = config.endpoint == "chat"
    return [json.dumps(fields | prompt.body(is_chat)).encode() for prompt in prompts]


def _ignores_eos(config: ServeConfig, server: dict[str, str]) -> bool:
    return "version" in server if config.ignore_eos is None else config.ignore_eos


async def _warm_up(target: Target, bodies: list[bytes]) -> None:
    if not bodies:
        return
    records, _ = await run_load(target.ask, bodies, Load())
    failed = [record for record in records if record.error is not None]
    if failed:
        raise InvalidRequestError(
            f"the server fails the warm-up: {failed[0].error}: {failed[0].detail}"
        )


def _settings(config: ServeConfig, server: dict[str, str]) -> dict[str, Any]:
    """The options that figures depend on, as they were resolved."""
    settings = asdict(config) | {"ignore_eos": _ignores_eos(config, server)}
    for name in ("url", "model", "api_key", "request_rate", "concurrency"):
        del settings[name]
    if config.prompts is None:
        settings["output_len"] = config.output_len or DEFAULT_OUTPUT_LEN
        del settings["prompts"]
    else:
        settings["prompts"] = str(config.prompts)
    return settings
