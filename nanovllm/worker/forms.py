"""Forms of outputs, compiled beside the steps."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from nanovllm.batch import EngineOutput, TextRequest
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.text.grammar_compiler import GrammarCompiler

logger = logging.getLogger(__name__)


class Forms:
    """Holds sequences back until the form of their output is compiled.

    Args:
        engine: Where the sequences are.
        compiler: Compiles, in a thread of ours.
    """

    def __init__(self, engine: LLMEngine, compiler: GrammarCompiler) -> None:
        self._engine = engine
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting: dict[int, Future[LLMatcher]] = {}
        self._paused: set[int] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a sequence waits."""
        return bool(self._waiting)

    def prepare(self, request: TextRequest) -> TextRequest:
        """The request with its form compiled or about to be."""
        if request.grammar is None:
            return request
        known = self._compiler.compiled(request.grammar)
        if known is None:
            matcher = self._thread.submit(self._compiler.compile, request.grammar)
        else:
            matcher = Future()
            matcher.set_result(known)
        return request._replace(matcher=matcher)

    def hold(self, seq_ids: Sequence[int], request: TextRequest) -> None:
        """Hold new sequences back, unless their form is there."""
        if request.matcher is not None and not request.matcher.done():
            self._waiting.update(dict.fromkeys(seq_ids, request.matcher))
            self._engine.pause(seq_ids, True)

    def pause(self, seq_ids: Sequence[int], paused: bool) -> None:
        """Pause sequences for another reason, or no more; those held back remain so."""
        held = self._waiting.keys() & set(seq_ids)
        if paused:
            self._paused |= held
        else:
            self._paused -= held
        self._engine.pause([seq_id for seq_id in seq_ids if seq_id not in held], paused)

    def settle(self) -> list[EngineOutput]:
        """Let sequences go whose form is there; returns the end of those that cannot have one."""
        outputs = []
        for seq_id in [seq_id for seq_id, matcher in self._waiting.items() if matcher.done()]:
            error = self._waiting.pop(seq_id).exception()
            paused = seq_id in self._paused
            self._paused.discard(seq_id)
            if error is None:
                self._engine.pause([seq_id], paused)
            elif self._engine.abort(seq_id) is not None:
                logger.error("a form that was sound could not be compiled: %s", error)
                outputs.append(EngineOutput(seq_id, None, None, "error", str(error)))
        return outputs
