"""A progress bar for batches, with the engine's rates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Rates(Protocol):
    """The counters the bar reads; `EngineStats` has them."""

    num_prompt_tokens: int
    num_output_tokens: int
    prefill_time: float
    decode_time: float


@contextmanager
def progress_bar(
    total: int, stats: Callable[[], Rates], visible: bool
) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` requests are done, and tokens per second.

    Args:
        total: Number of requests.
        stats: Called for the engine's counters.
        visible: Whether to show anything.

    Yields:
        A function to call with the number of finished requests.
    """
    if not visible:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    before = stats()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Requests", total=total, rates="")

        def advance_to(done: int) -> None:
            now = stats()
            prompt = now.num_prompt_tokens - before.num_prompt_tokens
            output = now.num_output_tokens - before.num_output_tokens
            prefill, decode = (
                now.prefill_time - before.prefill_time,
                now.decode_time - before.decode_time,
            )
            elapsed = max(prefill + decode, 1e-9)
            rates = f"{prompt / elapsed:.0f} prompt and {output / elapsed:.0f} output tokens/s"
            bar.update(task, completed=done, rates=rates)

        yield advance_to
