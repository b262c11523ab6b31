"""What an engine process has been given and has not finished yet."""

from collections.abc import Iterable, Sequence

from nanovllm.batch import EngineOutput, Key
from nanovllm.worker.messages import AddRequest, encode

EXPECTED_OUTPUT_TOKENS = 128
"""Output that a request is expected to have at most: most end long before they must, and one that
may fill the context must not look like a thousand others."""


class EngineRequest:
    """A request on its way to an engine, packed, and what is left of it to do.

    Args:
        message: What the engine is told.

    Raises:
        OverflowError: A number of it does not fit 64 bits.
        UnicodeEncodeError: A string of it is no Unicode.

    Attributes:
        packed: The message on the wire; packed here, where a failure harms nobody else.
        num_open: Sequences that have not ended.
        num_prompt_left: Prompt tokens to compute, until the first result shows that they are.
        num_output_left: Output tokens still expected.
        deadline: Monotonic time until which it may wait in line.
    """

    __slots__ = (
        "deadline",
        "message",
        "num_open",
        "num_output_left",
        "num_prompt_left",
        "packed",
    )

    def __init__(self, message: AddRequest) -> None:
        params = message.params
        expected = min(params.max_tokens or EXPECTED_OUTPUT_TOKENS, EXPECTED_OUTPUT_TOKENS)
        self.message = message
        self.packed = encode(message)
        self.num_open = params.n
        self.num_prompt_left = len(message.keys)
        self.num_output_left = expected * params.n
        self.deadline = 0.0

    @property
    def keys(self) -> Sequence[Key]:
        return self.message.keys

    @property
    def seq_ids(self) -> range:
        first = self.message.first_seq_id
        return range(first, first + self.message.params.n)


class WorkerLoad:
    """The open sequences of a worker and the work they still are.

    Attributes:
        sequences: Each open sequence's request.
        paused: Those of them that are held back.
        num_inflight: Requests with an open sequence.
        outstanding_tokens: Positions still to compute: prompts, and outputs as far as expected.
        waiting_tokens: Prompt tokens of the requests without a result yet.
    """

    def __init__(self) -> None:
        self.sequences: dict[int, EngineRequest] = {}
        self.paused: set[int] = set()
        self.num_inflight = 0
        self.outstanding_tokens = 0
        self.waiting_tokens = 0

    @property
    def num_runnable(self) -> int:
        """Open sequences that are not held back."""
        return len(self.sequences) - len(self.paused)

    def open(self, request: EngineRequest) -> None:
        """Count a request in."""
        self.sequences.update(dict.fromkeys(request.seq_ids, request))
        self.num_inflight += 1
        self.outstanding_tokens += request.num_prompt_left + request.num_output_left
        self.waiting_tokens += request.num_prompt_left

    def take(self, outputs: Iterable[EngineOutput]) -> None:
        """Count what a step has brought."""
        for output in outputs:
            request = self.sequences.get(output.seq_id)
            if request is None:
                continue
            if request.num_prompt_left:
                self._prompt_done(request)
            if output.key is not None and request.num_output_left:
                request.num_output_left -= 1
                self.outstanding_tokens -= 1
            if output.finish_reason is not None:
                self.close(output.seq_id)

    def pause(self, seq_ids: Iterable[int], paused: bool) -> None:
        """Hold open sequences back, or no more."""
        if paused:
            self.paused.update(seq_ids)
        else:
            self.paused.difference_update(seq_ids)

    def close(self, seq_id: int) -> bool:
        """Count a sequence out; False if it is not open."""
        request = self.sequences.pop(seq_id, None)
        self.paused.discard(seq_id)
        if request is None:
            return False
        request.num_open -= 1
        if not request.num_open:
            if request.num_prompt_left:
                self._prompt_done(request)
            self.num_inflight -= 1
            self.outstanding_tokens -= request.num_output_left
        return True

    def _prompt_done(self, request: EngineRequest) -> None:
        self.outstanding_tokens -= request.num_prompt_left
        self.waiting_tokens -= request.num_prompt_left
        request.num_prompt_left = 0
