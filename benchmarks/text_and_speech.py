"""Text and speech in one server: what each costs the other.

    python benchmarks/text_and_speech.py --release 0.5b

Random weights for both. Clients of each kind are put on the server alone and together, in turns:
the time to the first token of a text, and the time between the chunks of a stream of speech.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from header import headline
from local_server import HOST, PORT, put_under_load, serving
from rich.console import Console
from rich.table import Table

from nanovllm.bench.http import HTTPClient
from nanovllm.bench.speech import TEXT
from nanovllm.bench.speech_shapes import RELEASES, write_release
from nanovllm.bench.stats import Distribution

Figures = dict[str, list[float]]


class SpeechClients:
    """Clients that ask for speech, one text after the other, until they are told to end.

    Args:
        num_clients: How many.
        num_patches: Patches of each answer.
        model: Name of the speech model.
    """

    def __init__(self, num_clients: int, num_patches: int, model: str) -> None:
        self._num_clients = num_clients
        fields = {
            "model": model,
            "input": TEXT * 4,
            "response_format": "pcm",
            "min_len": num_patches,
            "max_generate_length": num_patches,
        }
        self._body = json.dumps(fields).encode()
        self.gaps: list[float] = []
        self.ttfbs: list[float] = []

    async def run(self, until: asyncio.Event) -> None:
        await asyncio.gather(*(self._client(until) for _ in range(self._num_clients)))

    async def _client(self, until: asyncio.Event) -> None:
        client = HTTPClient(f"http://{HOST}:{PORT}", {})
        while not until.is_set():
            begun = time.perf_counter()
            times = []
            async with client.send("POST", "/v1/audio/speech", self._body) as response:
                if response.status != 200:
                    raise RuntimeError((await response.read()).decode())
                async for _ in response.chunks():
                    times.append(time.perf_counter())
            self.ttfbs.append(times[0] - begun)
            self.gaps += [b - a for a, b in pairwise(times)]
        client.close()


def text_load(num_requests: int) -> dict[str, Any]:
    load = ("--concurrency", 4, "--num-requests", num_requests, "--input-len", "256")
    return put_under_load(*load, "--output-len", "32", "--num-warmups", 1)


async def text_alone(args: argparse.Namespace, model: str) -> Figures:  # noqa: ARG001
    figures = await asyncio.to_thread(text_load, args.num_texts)
    return {"text TTFT": figures["samples"]["ttft"]}


async def speech_alone(args: argparse.Namespace, model: str) -> Figures:
    return await together(args, model, lambda: asyncio.sleep(args.seconds))


async def both(args: argparse.Namespace, model: str) -> Figures:
    figures: Figures = {}

    async def write() -> None:
        figures.update(await text_alone(args, model))

    return await together(args, model, write) | figures


async def together(
    args: argparse.Namespace, model: str, meanwhile: Callable[[], Awaitable[None]]
) -> Figures:
    clients, enough = SpeechClients(args.streams, args.num_patches, model), asyncio.Event()
    speaking = asyncio.ensure_future(clients.run(enough))
    await meanwhile()
    enough.set()
    await speaking
    return {"speech, gap": clients.gaps, "speech TTFB": clients.ttfbs}


def report(results: dict[str, Figures], console: Console) -> None:
    table = Table("ms", "load", "p50", "p90", "p99", "max", "samples")
    for name in ("text TTFT", "speech TTFB", "speech, gap"):
        for load, figures in results.items():
            if (spread := Distribution.of(figures.get(name, []))) is not None:
                values = (spread.p50, spread.p90, spread.p99, spread.max)
                cells = (f"{1e3 * value:.0f}" for value in values)
                table.add_row(name, load, *cells, str(len(figures[name])))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", choices=RELEASES, default="0.5b")
    parser.add_argument("--streams", type=int, default=1, help="clients of speech")
    parser.add_argument("--num-patches", type=int, default=40)
    parser.add_argument("--num-texts", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", nargs="*", default=[], help="more for `nanovllm serve`")
    args = parser.parse_args()
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = write_release(Path(directory, f"voxcpm-{args.release}"), args.release)
        options = ("--dummy-weights", "--speech-model", str(model), "--speech-max-num-seqs", "16")
        with serving(*options, "--speech-max-model-len", "1024", *args.options):
            for number in range(args.rounds):
                for load in (text_alone, speech_alone, both):
                    name = load.__name__.replace("_", " ")
                    figures = asyncio.run(load(args, model.name))
                    if number:  # the first round warms up
                        for what, values in figures.items():
                            results.setdefault(name, {}).setdefault(what, []).extend(values)
    console = Console()
    console.print(headline(f"VoxCPM {args.release}", f"{args.streams} streams", str(args.options)))
    report(results, console)


if __name__ == "__main__":
    main()
