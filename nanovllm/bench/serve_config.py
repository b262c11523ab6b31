"""The options of a load test, apart from what runs it so that the command line loads at once."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanovllm.bench.workload import ListedPrompts, RandomPrompts, Range, read_prompts
from nanovllm.errors import InvalidRequestError

UNITS = {"ms": 1e-3, "s": 1.0}
DEFAULT_OUTPUT_LEN = "128"
LOWEST = {
    **dict.fromkeys(("num_requests", "num_prefixes", "vocab_size", "concurrency"), 1),
    **dict.fromkeys(("prefix_len", "num_warmups", "temperature"), 0),
    **dict.fromkeys(("request_rate", "timeout"), 0.001),
}
"""The least that options may be."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered.

    Args:
        request_rate: Open loop: requests per second on average, at exponentially distributed gaps;
            infinite is all at once.
        concurrency: Closed loop, in place of that: so many clients that each wait for their answer.
    """

    request_rate: float = math.inf
    concurrency: int | None = None

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return "all at once" if math.isinf(self.request_rate) else f"{self.request_rate:g}/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A load test.

    Args:
        url: Base URL of the server, with or without `/v1`.
        model: Name of the model; None is the first that the server lists.
        api_key: Key that the server asks for.
        endpoint: "completions", with random token ids, or "chat", with random words.
        num_requests: Requests of each load.
        request_rate: Open loop: requests per second on average, at exponentially distributed
            gaps; "inf" sends all at once.
        concurrency: Closed loop: so many clients that each wait for their answer.
        sweep: Several loads one after the other, `rate=1,2,4` or `concurrency=1,8,64`.
        input_len: Tokens of a prompt, `N` or evenly distributed over `LOW:HIGH`; words in a chat.
        output_len: The same for the tokens to generate; 128 unless a file of prompts says else.
        prefix_len: Tokens before these that prompts share with others.
        num_prefixes: How many such prefixes there are.
        vocab_size: Random ids are below this, which every tokenizer has.
        prompts: File of JSON lines in place of random prompts: `prompt` (text or ids) or, for a
            chat, `messages`, and `max_tokens`.
        temperature: To sample at; 0 is greedy.
        ignore_eos: Whether to generate past the end of the text; None is yes where the server
            answers at `/version`, as ours and vLLM's do.
        num_warmups: Requests sent before, which do not count.
        timeout: Seconds a request may take.
        slo: Limits for goodput, such as `ttft=200ms,tpot=50ms,e2e=2s`.
        seed: Of prompts, lengths and gaps.

    Raises:
        InvalidRequestError: An option is outside its range.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    endpoint: Literal["completions", "chat"] = "completions"
    num_requests: int = 100
    request_rate: float = math.inf
    concurrency: int | None = None
    sweep: str | None = None
    input_len: str = "256"
    output_len: str | None = None
    prefix_len: int = 0
    num_prefixes: int = 1
    vocab_size: int = 1000
    prompts: Path | None = None
    temperature: float = 0.6
    ignore_eos: bool | None = None
    num_warmups: int = 2
    timeout: float = 600.0
    slo: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise InvalidRequestError(f"{name} must be at least {low}, got {value}", name)
        loads = (
            self.concurrency is not None,
            self.request_rate != math.inf,
            self.sweep is not None,
        )
        if sum(loads) > 1:
            raise InvalidRequestError(
                "request_rate (open loop), concurrency (closed loop) and sweep (several of either) "
                "exclude each other"
            )
        if self.slo is not None:
            parse_slo(self.slo)
        self.loads()
        self.source()

    def loads(self) -> list[Load]:
        """The loads to run, in order."""
        if self.sweep is None:
            return [Load(self.request_rate, self.concurrency)]
        kind, _, values = self.sweep.rpartition("=")
        read = int if kind == "concurrency" else float
        try:
            numbers = [read(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if kind not in ("", "rate", "concurrency") or not numbers or min(numbers) <= 0:
            raise InvalidRequestError(
                f"sweep must be rate=1,2,4 or concurrency=1,8,64, got {self.sweep!r}", "sweep"
            )
        if kind == "concurrency":
            return [Load(concurrency=int(number)) for number in numbers]
        return [Load(request_rate=number) for number in numbers]

    def source(self) -> RandomPrompts | ListedPrompts:
        """Where the prompts come from."""
        is_chat = self.endpoint == "chat"
        if self.prompts is not None:
            length = self.output_len
            limit = None if length is None else Range.parse(length, "output_len")
            return read_prompts(self.prompts, is_chat, limit)
        # An empty prompt is no request, so something has to come after no prefix.
        return RandomPrompts(
            input_len=Range.parse(self.input_len, "input_len", 0 if self.prefix_len else 1),
            output_len=Range.parse(self.output_len or DEFAULT_OUTPUT_LEN, "output_len"),
            prefix_len=self.prefix_len,
            num_prefixes=self.num_prefixes,
            vocab_size=self.vocab_size,
            is_text=is_chat,
        )


def parse_slo(text: str) -> dict[str, float]:
    """Read latencies that a request must not exceed, such as `ttft=200ms,tpot=50ms`.

    Raises:
        InvalidRequestError: A name is none of ttft, tpot and e2e, or a time has no unit.
    """
    slo = {}
    for part in text.split(","):
        name, _, limit = part.strip().partition("=")
        unit = "ms" if limit.endswith("ms") else limit[-1:]
        try:
            seconds = float(limit.removesuffix(unit)) * UNITS[unit]
        except (KeyError, ValueError) as e:
            raise InvalidRequestError(
                f"slo must look like ttft=200ms,tpot=50ms,e2e=2s; {part!r} does not", "slo"
            ) from e
        if name not in ("ttft", "tpot", "e2e") or not seconds > 0:
            raise InvalidRequestError(f"slo takes ttft, tpot and e2e above 0, got {part!r}", "slo")
        slo[name] = seconds
    return slo
