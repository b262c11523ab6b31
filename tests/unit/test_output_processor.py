"""The output processor: text, stop strings, log probabilities and the life of a request."""

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from nanovllm.batch import EngineOutput, TextPayload, TokenScores
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.output_processor import OutputProcessor, StopSearch, StopStrings
from nanovllm.text.tokenizer import Tokenizer

PROMPT = [72, 73]


@lru_cache
def tokenizer() -> Tokenizer:
    """One id a byte, `</s>`, and a few ids of several bytes."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("ab", "a"), ("c", "c"), ("Ġ", "a")]
    vocab |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text)


EOS = 260


class Engine:
    """Feeds one request to a processor, a token at a time."""

    def __init__(self, params: SamplingParams, processor: OutputProcessor | None = None) -> None:
        self.processor = OutputProcessor(tokenizer()) if processor is None else processor
        seq_ids = list(range(10, 10 + params.n))
        self.output = self.processor.add("r", seq_ids, "HI", PROMPT, params, time.monotonic())

    def step(
        self,
        key: int | None,
        finish: str | None = None,
        seq_id: int = 10,
        payload: TextPayload | None = None,
        stop_reason: int | str | None = None,
    ) -> list[int]:
        news = EngineOutput(seq_id, key, payload, finish, stop_reason, 4, time.monotonic())
        return self.processor.process([news])[1]

    def run(self, ids: Sequence[int], finish: str = "length") -> RequestOutput:
        for i, token_id in enumerate(ids):
            if self.step(token_id, finish if i == len(ids) - 1 else None):
                break
        return self.output


def generate(text: str, params: SamplingParams | None = None) -> RequestOutput:
    return Engine(params or SamplingParams()).run(ids_of(text))


def test_text_and_life_of_a_request() -> None:
    engine = Engine(SamplingParams())
    assert len(engine.processor) == 1
    assert engine.output.metrics.first_token_time is None
    updates, to_abort = engine.processor.process([EngineOutput(10, 66, scheduled_time=1.0)])
    assert updates == [engine.output]
    assert updates[0] is engine.output
    assert (engine.output["text"], engine.output["token_ids"], to_abort) == ("c", [66], [])
    assert not engine.output.finished
    engine.step(67, "length")
    metrics = engine.output.metrics
    assert (engine.output["text"], engine.output.finish_reason) == ("cd", "length")
    assert engine.output.num_cached_tokens == 0
    assert metrics.first_scheduled_time == 1.0
    times = (metrics.arrival_time, metrics.first_token_time, metrics.finished_time)
    assert list(times) == sorted(time for time in times if time is not None)
    assert len(engine.processor) == 0
    assert engine.processor.process([EngineOutput(10, 66), EngineOutput(99, 66)]) == ([], [])
    assert engine.output["text"] == "cd"


def test_the_token_that_ends_a_text_is_no_text() -> None:
    output = Engine(SamplingParams()).run(ids_of("hello</s>"), "stop")
    assert output["text"] == "hello"
    assert output["token_ids"] == [*ids_of("hello"), EOS]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    engine = Engine(SamplingParams(stop_token_ids=[ids_of("o")[0]]))
    assert engine.run(ids_of("hello"), "stop")["text"] == "hell"
    engine = Engine(SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False))
    assert engine.run(ids_of("hello</s>"), "stop")["text"] == "hello</s>"


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_other_ends_keep_their_text(reason: str) -> None:
    engine = Engine(SamplingParams(stop="lot"))
    engine.step(ids_of("h")[0])
    engine.step(ids_of("l")[0])
    assert engine.output["text"] == "h"
    assert engine.step(None, reason, stop_reason="why") == []
    assert engine.output["text"] == "hl"
    assert (engine.output.finish_reason, engine.output.stop_reason) == (reason, "why")


def test_a_stop_string_across_tokens_is_cut_exactly() -> None:
    engine = Engine(SamplingParams(stop=["</done>", "xyz"], max_tokens=None))
    shown = []
    for token_id in ids_of("So <it> is.</done> more"):
        to_abort = engine.step(token_id)
        shown.append(engine.output["text"])
        if to_abort:
            break
    assert to_abort == [10]
    assert shown[-1] == "So <it> is."
    # "<" is held back for one token only: streaming is prompt.
    assert shown[3:6] == ["So ", "So <i", "So <it"]
    assert (engine.output.finish_reason, engine.output.stop_reason) == ("stop", "</done>")
    assert bytes(engine.output.outputs[0].token_ids[-1:]) == bytes(ids_of(">"))
    assert len(engine.processor) == 0


def test_an_engine_that_has_ended_too_needs_no_abort() -> None:
    engine = Engine(SamplingParams(stop="b"))
    assert engine.step(ids_of("a")[0]) == []
    assert engine.step(ids_of("b")[0], "length") == []
    assert (engine.output["text"], engine.output.stop_reason) == ("a", "b")
    assert engine.output.finish_reason == "stop"


def test_include_stop_string() -> None:
    params = SamplingParams(stop="top", include_stop_str_in_output=True)
    assert generate("ab stop ab", params)["text"] == "ab stop"


def test_the_earliest_stop_string_wins() -> None:
    checker = StopSearch(StopStrings(["cd", "bcd", "a?"]))
    assert checker.push("xa") == ("x", None)
    assert checker.push("bcde") == ("a", "bcd")


def test_completions_share_what_is_known_of_stop_strings() -> None:
    """With 128 of them, 16 strings of 256 characters took 320 MB."""
    stops = ["ab" * 128, "ba" * 128]
    sizes = []
    for n in (1, 65):
        tracemalloc.start()
        engine = Engine(SamplingParams(n=n, stop=stops))
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(engine.output.outputs) == n
    assert sizes[1] < 4 * sizes[0]


def test_min_tokens_ignores_what_ends_before() -> None:
    assert generate("b b xb", SamplingParams(stop="b", min_tokens=1))["text"] == "b "
    assert generate("bcbcbc", SamplingParams(stop="bc", min_tokens=3))["text"] == "bc"
    # "c" ends before the third token, although "cx!" keeps it held back.
    params = SamplingParams(stop=["cx!", "c"], min_tokens=2)
    assert generate("acxc", params)["text"] == "acx"


def test_halves_of_characters_are_never_shown() -> None:
    engine = Engine(SamplingParams(max_tokens=None))
    text = "a👩‍👩‍👧b 你"
    for token_id in ids_of(text)[:-1]:
        engine.step(token_id)
        assert text.startswith(engine.output.outputs[0].text)
    engine.step(None, "length")
    assert engine.output["text"] == text[:-1]


def test_without_text() -> None:
    for processor in (OutputProcessor(None), None):
        engine = Engine(SamplingParams(detokenize=processor is not None, logprobs=0), processor)
        engine.step(66, payload=TextPayload(TokenScores([66], [-1.0], 1)))
        engine.step(67, "length", payload=TextPayload(TokenScores([67], [-1.5], 2)))
        assert (engine.output["text"], engine.output["token_ids"]) == ("", [66, 67])
        assert engine.output.outputs[0].logprobs == [{66: Logprob(-1.0, 1)}, {67: Logprob(-1.5, 2)}]
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        Engine(SamplingParams(stop="x"), OutputProcessor(None))


def test_logprobs() -> None:
    a, b, c = ids_of("bcd")
    engine = Engine(SamplingParams(logprobs=2, prompt_logprobs=1))
    prompt_scores = [None, TokenScores([73, b], [-3.0, -0.1], 7)]
    scores = TokenScores([c, a, b], [-5.0, -0.5, -1.0], 9)
    engine.step(c, payload=TextPayload(scores, prompt_scores))
    engine.step(a, "length", payload=TextPayload(TokenScores([a, a, b], [-0.5, -0.5, -1.0], 1)))
    first = engine.output.outputs[0]
    assert first.cumulative_logprob == -5.5
    assert first.logprobs is not None
    assert list(first.logprobs[0].items()) == [
        (c, Logprob(-5.0, 9, "d")),
        (a, Logprob(-0.5, 1, "b")),
        (b, Logprob(-1.0, 2, "c")),
    ]
    assert list(first.logprobs[1]) == [a, b]
    expected = {73: Logprob(-3.0, 7, tokenizer().token_text(73)), b: Logprob(-0.1, 1, "c")}
    assert engine.output.prompt_logprobs == [None, expected]
    plain = generate("ab").outputs[0]
    assert (plain.logprobs, plain.cumulative_logprob) == (None, None)


def test_several_completions() -> None:
    engine = Engine(SamplingParams(n=3, stop="!"))
    process = engine.processor.process
    updates, _ = process([EngineOutput(i, ids_of("x")[0], num_cached=i) for i in (11, 10, 12)])
    assert updates == [engine.output]
    assert engine.output.num_cached_tokens == 10
    assert engine.step(ids_of("!")[0], seq_id=11) == [11]
    assert engine.step(None, "abort", seq_id=11) == []
    engine.step(ids_of("y")[0], "length", seq_id=12)
    assert [o.finish_reason for o in engine.output.outputs] == [None, "stop", "length"]
    assert [o.text for o in engine.output.outputs] == ["x", "x", "xy"]
    unfinished_metrics = replace(engine.output.metrics)
    assert unfinished_metrics.finished_time is None
    assert engine.processor.abort("r") == [10]
    assert engine.output.finished
    assert engine.output.finish_reason == "abort"
    assert engine.output.metrics.finished_time is not None
    assert len(engine.processor) == 0
    assert engine.processor.abort("r") == []


def test_abort_releases_what_was_held_back() -> None:
    engine = Engine(SamplingParams(stop="stop"))
    for token_id in ids_of("go sto"):
        engine.step(token_id)
    assert engine.output["text"] == "go "
    assert engine.processor.abort("r") == [10]
    assert engine.output["text"] == "go sto"


def test_a_request_id_is_taken_only_while_it_runs() -> None:
    engine = Engine(SamplingParams())
    with pytest.raises(InvalidRequestError, match="still running"):
        engine.processor.add("r", [99], None, [], SamplingParams(), 0.0)
    engine.step(None, "abort")
    engine.processor.add("r", [99], None, [], SamplingParams(), 0.0)


def naive(pieces: list[str], stops: list[str], min_tokens: int) -> tuple[str, str | None]:
    """Cut the whole text at the first stop string that shows up as tokens arrive."""
    text = ""
    for i, piece in enumerate(pieces):
        old, text = len(text), text + piece
        if i < min_tokens:
            continue
        found = [
            (start, stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > old
        ]
        if found:
            return text[: min(start for start, _ in found)], "stop"
    return text, None


@given(
    st.text("abc é你👩", max_size=20),
    st.lists(st.text("abc é你", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 5),
    st.data(),
)
@example("aab", ["aab"], 0, None)
@settings(max_examples=300, deadline=None)
def test_equals_the_naive_definition(
    text: str, stops: list[str], min_tokens: int, data: st.DataObject | None
) -> None:
    """Any text, any cuts into tokens, any stop strings."""
    ids: list[int] = []
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest))) if data else 1
        ids, rest = ids + ids_of(rest[:size]), rest[size:]
    whole = [tokenizer().decode(ids[: i + 1]) for i in range(len(ids))]
    whole = [prefix.split("\ufffd")[0] for prefix in whole]
    pieces = [new[len(old) :] for old, new in zip(["", *whole], whole, strict=False)]
    expected, reason = naive(pieces, stops, min_tokens)
    engine = Engine(SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=None))
    for i, token_id in enumerate(ids):
        if engine.step(token_id, "length" if i == len(ids) - 1 else None):
            break
        assert text.startswith(engine.output.outputs[0].text)
    assert engine.output["text"] == expected
    assert engine.output.finish_reason == (reason or ("length" if ids else None))
