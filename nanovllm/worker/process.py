"""The engine process: takes requests from its link, steps, and reports."""

import contextlib
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from nanovllm.batch import EngineOutput, TextRequest
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidRequestError, RankDiedError
from nanovllm.text.grammar_compiler import GrammarCompiler
from nanovllm.worker.calls import Callee, Calls
from nanovllm.worker.forms import Forms
from nanovllm.worker.messages import (
    AbortSequences,
    AddRequest,
    CancelCall,
    EncodeAudio,
    Failed,
    FromWorker,
    LoadAdapter,
    LogRecord,
    News,
    PauseSequences,
    Shutdown,
    Start,
    Started,
    ToWorker,
    UnloadAdapter,
    decode_to_worker,
    encode,
)

if TYPE_CHECKING:
    from nanovllm.runners.parallel import ParallelRunner

logger = logging.getLogger(__name__)

FORM_POLL = 0.005
"""Seconds between looks at a form that is being compiled, while there is nothing else to do."""
ALIVE_POLL = 1.0
"""Seconds between looks at the engine's other processes, while there is nothing else to do."""
MAX_FAILED_STEPS = 3
"""Steps that fail one after the other before the device counts as lost."""


class WorkerLink:
    """The worker's end of the link, for the thread that made it.

    Args:
        address: Where the client expects us.
    """

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(address)

    def send(self, message: FromWorker) -> None:
        self._socket.send(encode(message))

    def receive(self, timeout: float | None) -> Iterator[ToWorker]:
        """Yield what has arrived, waiting for the first up to `timeout` seconds; None waits on."""
        if not self._socket.poll(None if timeout is None else math.ceil(timeout * 1000)):
            return
        try:
            while True:
                yield decode_to_worker(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return

    def close(self) -> None:
        self._socket.close()
        zmq.Context.instance().term()


class LinkHandler(logging.Handler):
    """Logs through the link, so that one process decides what a log looks like.

    The link belongs to one thread. What others log goes out with that thread's next record, or
    with `flush`.
    """

    def __init__(self, link: WorkerLink) -> None:
        super().__init__()
        self._link = link
        self._thread = threading.get_ident()
        self._records: deque[LogRecord] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(LogRecord(record.name, record.levelno, self.format(record)))
        self.flush()

    def flush(self) -> None:
        while self._records and threading.get_ident() == self._thread:
            self._link.send(self._records.popleft())


class EngineLoop:
    """Steps an engine while there is work, and waits for requests while there is none.

    Args:
        engine: The engine.
        link: Where requests come from and news go to.
        queue_coalesce_ms: How long to wait for more requests once one ends an idle time.
        callee: What calls are for.
        compiler: Compiles the forms of outputs; None where the model writes none.
        ranks: Runs the model together with other processes, if it does; that one has died is then
            not only found out by the next step.
    """

    def __init__(
        self,
        engine: LLMEngine,
        link: WorkerLink,
        queue_coalesce_ms: float,
        callee: Callee,
        compiler: GrammarCompiler | None = None,
        ranks: "ParallelRunner | None" = None,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._link = link
        self._calls = Calls(callee, link.send)
        self._forms = None if compiler is None else Forms(engine, compiler)
        self._coalesce_time = queue_coalesce_ms / 1000
        self._refused: list[EngineOutput] = []
        self._num_handled = 0
        self._num_failed_steps = 0
        self._running = True

    def close(self) -> None:
        """End the engine's other processes."""
        if self._ranks is not None:
            self._ranks.close()

    def run(self) -> None:
        """Work until the client says `Shutdown`.

        Raises:
            RankDiedError: A process that has a part of the model died.
        """
        while self._running:
            self._take_requests()
            if self._forms is not None:
                self._refused += self._forms.settle()
            if self._running and self._engine.has_work:
                started = time.perf_counter()
                self._step()
                self._calls.advance_after(time.perf_counter() - started)
            else:
                self._calls.advance_idle()
                self._report([], 0)

    def _take_requests(self) -> None:
        idle = not self._engine.has_work
        timeout = 0.0 if not idle or self._calls.is_busy else None
        if timeout is None and self._forms is not None and self._forms.is_busy:
            timeout = FORM_POLL
        if self._ranks is not None:
            timeout = ALIVE_POLL if timeout is None else timeout
            self._ranks.check_alive()
        self._apply(self._link.receive(timeout))
        if not idle or not self._engine.has_work:
            return
        deadline = time.monotonic() + self._coalesce_time
        while self._running and (remaining := deadline - time.monotonic()) > 0:
            self._apply(self._link.receive(remaining))

    def _apply(self, messages: Iterator[ToWorker]) -> None:
        for message in messages:
            self._num_handled += 1
            if isinstance(message, AddRequest):
                self._add(message)
            elif isinstance(message, AbortSequences):
                for seq_id in message.seq_ids:
                    self._engine.abort(seq_id)
            elif isinstance(message, PauseSequences):
                (self._forms or self._engine).pause(message.seq_ids, message.paused)
            elif isinstance(message, EncodeAudio | LoadAdapter | UnloadAdapter):
                self._calls.take(message)
            elif isinstance(message, CancelCall):
                self._calls.cancel(message.call_id)
            elif isinstance(message, Shutdown):
                self._running = False

    def _add(self, request: AddRequest) -> None:
        payload = request.payload
        try:
            self._calls.check(request)
            if self._forms is not None and isinstance(payload, TextRequest):
                payload = self._forms.prepare(payload)
            seq_ids = self._engine.add(
                list(request.keys),
                request.params,
                priority=request.priority,
                cache_salt=request.cache_salt,
                adapter_id=request.adapter_id,
                schedules_ahead=not isinstance(payload, TextRequest) or payload.grammar is None,
                payload=payload,
                first_seq_id=request.first_seq_id,
            )
            if self._forms is not None and isinstance(payload, TextRequest):
                self._forms.hold(seq_ids, payload)
        except ValueError as e:  # the client checks first, so this is a bug of ours
            logger.exception("the engine refused a request")
            first = request.first_seq_id
            self._refused += [
                EngineOutput(seq_id, None, None, "error", str(e))
                for seq_id in range(first, first + request.params.n)
            ]

    def _step(self) -> None:
        stats = self._engine.stats()
        num_computed, num_steps = stats.num_computed_tokens, stats.num_steps
        try:
            outputs = self._engine.step()
        except RankDiedError:
            raise
        except Exception:
            logger.exception("a step failed; its sequences end with an error")
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS:
                raise
            outputs = []
        stats = self._engine.stats()
        if stats.num_steps > num_steps:  # a call may also just report what failed before
            self._num_failed_steps = 0
        self._report(outputs, stats.num_computed_tokens - num_computed)

    def _report(self, outputs: list[EngineOutput], num_positions: int) -> None:
        outputs, self._refused = self._refused + outputs, []
        self._link.send(News(outputs, self._engine.stats(), num_positions, self._num_handled))


def main(address: str) -> None:
    """Run an engine until the client says so, or is gone."""
    threading.Thread(target=_exit_with_client, args=(address,), daemon=True).start()
    # A supervisor may signal the whole group; it is the client that decides when we end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = WorkerLink(address)
    logging.basicConfig(level=logging.INFO, handlers=[LinkHandler(link)], format="%(message)s")
    start = next(link.receive(None))
    if not isinstance(start, Start):
        raise RuntimeError(f"a worker begins with Start, got {type(start).__name__}")
    loop = _load(start, link)
    try:
        if loop is not None:
            _run(loop, link)
    finally:
        link.close()


def _run(loop: EngineLoop, link: WorkerLink) -> None:
    try:
        loop.run()
    except RankDiedError as e:
        logger.error("%s", e)
        loop.close()
        link.close()
        # At once: a device may never be done with what it did together with others.
        os._exit(1)


def _load(start: Start, link: WorkerLink) -> EngineLoop | None:
    """Build the engine and say so, or say why it cannot be built."""
    try:
        if start.cuda_devices is not None:
            visible = ",".join(visible_device(index) for index in start.cuda_devices)
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    except InvalidRequestError as e:
        link.send(Failed(type(e).__name__, str(e)))
        return None
    import torch

    from nanovllm.runners.memory import select_device
    from nanovllm.runners.parallel import ParallelRunner
    from nanovllm.runners.speech import SpeechRunner
    from nanovllm.worker.loading import load_engine

    config = start.config
    if start.cuda_devices is not None and config.device == "auto":
        config = replace(config, device="cuda")
    try:
        if start.cpus is not None and select_device(config.device).type == "cpu":
            os.sched_setaffinity(0, start.cpus)
            torch.set_num_threads(len(start.cpus))
        engine, runner, config = load_engine(config, Path(start.directory))
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        logger.debug("the engine could not be built", exc_info=True)
        link.send(Failed(type(e).__name__, str(e)))
        return None
    # What is loaded stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    link.send(Started(config, runner.num_kv_blocks, runner.max_model_len))
    compiler = None if isinstance(runner, SpeechRunner) else runner.grammars
    ranks = runner if isinstance(runner, ParallelRunner) else None
    return EngineLoop(engine, link, start.queue_coalesce_ms, runner, compiler, ranks)


def visible_device(index: int) -> str:
    """The CUDA device of this number among those that we may use.

    Raises:
        InvalidRequestError: There are not so many.
    """
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ours is None:
        return str(index)
    devices = [device.strip() for device in ours.split(",") if device.strip()]
    if index >= len(devices):
        raise InvalidRequestError(
            f"device {index} is not among the {len(devices)} of CUDA_VISIBLE_DEVICES={ours}",
            "devices",
        )
    return devices[index]


def _exit_with_client(address: str) -> None:
    """End at once when the client's end of our standard input closes, whatever is going on."""
    os.read(sys.stdin.fileno(), 1)
    socket = Path(address.removeprefix("ipc://"))  # the client may have been killed and left it
    with contextlib.suppress(OSError):
        socket.unlink()
    with contextlib.suppress(OSError):  # other engines have theirs there, too
        socket.parent.rmdir()
    os._exit(1)
