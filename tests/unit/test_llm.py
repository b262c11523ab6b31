"""`LLM` as a user meets it: results, streams, aborts, and what their mistakes are told."""

import copy
import errno
import gc
import itertools
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm import llm as llm_module
from nanovllm.batch import Batch
from nanovllm.config import DEMO_MODEL
from nanovllm.engine import llm_engine, scheduler
from nanovllm.errors import InvalidRequestError, NotEnoughMemoryError, UnsupportedModelError
from nanovllm.kernels.kernels import Kernels
from nanovllm.text import output_processor
from nanovllm.text.input_processor import Prompt
from nanovllm.worker import loading
from tests.ctrl_c import ctrl_c_at_line

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Any:
    yield
    if "llm" in request.fixturenames:
        llm: LLM = request.getfixturevalue("llm")
        assert not llm.has_unfinished()
        assert llm.engine.scheduler.num_free_slots == 8
        assert llm.engine.stats().num_used_blocks == 0


def test_one_prompt_or_many_as_text_or_ids(llm: LLM) -> None:
    ids = llm.encode("Once upon a time")
    single = llm.generate("Once upon a time", GREEDY, use_tqdm=False)
    prompts: list[Prompt] = ["Once upon a time", ids, "The king"]
    many = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert len(single) == 1
    assert [out["token_ids"] for out in many[:2]] == [single[0]["token_ids"]] * 2
    assert many[1].prompt is None
    assert many[2].prompt == "The king"
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0]["text"] == single[0]["text"]
    assert single[0]["text"] == llm.decode(single[0].outputs[0].token_ids)


def test_a_list_of_parameters_goes_with_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5)]
    outputs = llm.generate(["A", "B"], params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == [1, 5]
    assert {out.finish_reason for out in outputs} == {"length"}


def test_prompts_come_as_vllm_and_numpy_give_them_too(llm: LLM) -> None:
    ids = llm.encode("Once upon a time")
    expected = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0]["text"]
    prompts: list[Any] = [{"prompt": "Once upon a time"}, {"prompt_token_ids": ids}, np.array(ids)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [out["text"] for out in outputs] == [expected] * 3
    assert llm.generate({"prompt_token_ids": ids}, GREEDY, use_tqdm=False)[0]["text"] == expected


def test_a_prompt_may_bring_its_cache_salt(llm: LLM) -> None:
    ids = list(range(100, 150))
    for salt, is_cached in [(None, False), (None, True), ("a", False), ("a", True), ("b", False)]:
        (output,) = llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, use_tqdm=False)
        assert bool(output.num_cached_tokens) == is_cached


def test_prompts_run_by_priority(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = llm.engine.scheduler.add

    def record(seq: Any) -> None:
        added.append(seq.precedence[0])
        add(seq)

    monkeypatch.setattr(llm.engine.scheduler, "add", record)
    outputs = llm.generate(["A", "B", "C"], GREEDY, use_tqdm=False, priority=[5, -1, 0])
    assert added == [5, -1, 0]
    assert [output.prompt for output in outputs] == ["A", "B", "C"]
    for wrong in ([1, 2], [0, 1, "2"], 3):
        with pytest.raises(InvalidRequestError, match="priority must be a list of 3 integers"):
            llm.generate(["A", "B", "C"], GREEDY, priority=wrong)  # type: ignore[arg-type]


def test_an_empty_batch_is_an_empty_result(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_a_stream_grows_to_the_result(llm: LLM) -> None:
    expected = llm.generate("The wolf", GREEDY, use_tqdm=False)[0]
    seen = list(llm.stream("The wolf", GREEDY))
    texts = [out.outputs[0].text for out in seen]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == expected["text"]
    assert [out.finished for out in seen] == [False] * (len(seen) - 1) + [True]


def test_interleaved_streams_do_not_lose_each_others_news(llm: LLM) -> None:
    prompts = ["The wolf", "The king", "Once"]
    expected = [out["text"] for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    last: list[RequestOutput | None] = [None] * 3
    while any(out is None or not out.finished for out in last):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i])
    assert [out["text"] for out in last if out is not None] == expected


def test_closing_a_stream_frees_its_request(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    assert llm.has_unfinished()
    stream.close()


def test_an_interrupt_frees_every_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    launch = llm.engine._runner.launch

    def interrupted(batch: Batch) -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return launch(batch)

    monkeypatch.setattr(llm.engine._runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"] * 5, SamplingParams(max_tokens=50), use_tqdm=False)
    monkeypatch.undo()
    llm.step()  # reports what the interrupted step ended; nobody waits for it


def test_ctrl_c_anywhere_frees_every_request(llm: LLM) -> None:
    expected = llm.generate("The fox", GREEDY, use_tqdm=False)[0]["text"]
    modules = llm_module, llm_engine, scheduler, output_processor
    num_interrupts = 0
    for line in itertools.count(1, 23):
        try:
            with ctrl_c_at_line(line, *modules):
                llm.generate(["a", "b"], SamplingParams(n=2, max_tokens=3), use_tqdm=False)
            break
        except KeyboardInterrupt:
            num_interrupts += 1
        assert llm.engine.scheduler.num_free_slots == 8
        assert not llm._outputs._requests
        llm.step()
        assert llm.generate("The fox", GREEDY, use_tqdm=False)[0]["text"] == expected
    assert num_interrupts > 20


def test_add_step_and_abort(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    kept, dropped = llm.add_request("The fox", params), llm.add_request("The hen", params)
    llm.step()
    llm.abort(dropped)
    llm.abort(dropped)
    final: dict[str, RequestOutput] = {}
    while not llm.is_finished():
        final |= {out.request_id: out for out in llm.step()}
    assert final[kept].finish_reason == "length"
    assert dropped not in final


@pytest.mark.parametrize(
    "options",
    [{"priority": "x"}, {"priority": None}, {"priority": 1.5}, {"cache_salt": 5}],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_request_is_added_whole_or_not_at_all(llm: LLM, n: int, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.add_request("Once", SamplingParams(n=n), **options)
    assert caught.value.param in options
    assert not llm.has_unfinished()


def test_n_completions_share_the_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=20)
    output = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({completion.text for completion in output.outputs}) == 3


def test_a_seed_fixes_the_text_whatever_runs_beside_it(llm: LLM) -> None:
    params = SamplingParams(seed=11, max_tokens=20, temperature=1.2)
    alone = llm.generate("Far away", params, use_tqdm=False)[0]["text"]
    among = llm.generate(["x", "Far away", "y z"], params, use_tqdm=False)[1]["text"]
    assert alone == among


def test_stop_strings_and_ids(llm: LLM) -> None:
    free = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0]
    text, ids = free.outputs[0].text, free.outputs[0].token_ids
    word = text.split()[3]
    cut = llm.generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=12, stop=word), use_tqdm=False
    )[0]
    assert cut["text"] == text[: text.index(word)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", word)
    at_id = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[ids[4]])
    stopped = llm.generate("Once upon a time", at_id, use_tqdm=False)[0]
    assert stopped["token_ids"] == ids[: ids.index(ids[4]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ids[4])


def test_the_context_clips_the_output(checkpoint: Callable[[str], Path]) -> None:
    with LLM(str(checkpoint("qwen3")), max_model_len=32) as llm:
        output = llm.generate([1] * 20, SamplingParams(max_tokens=None), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 12
    assert output.finish_reason == "length"


def test_cached_tokens_and_timings_are_reported(llm: LLM) -> None:
    prompt = llm.encode("There was once a miller who had three sons, and the youngest of them") * 3
    llm.generate(prompt, GREEDY, use_tqdm=False)
    output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    times = output.metrics
    assert times.first_scheduled_time is not None
    assert times.first_token_time is not None
    assert times.finished_time is not None
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time
    assert times.first_token_time <= times.finished_time


def test_a_salt_keeps_requests_apart(llm: LLM) -> None:
    prompt = llm.encode("A secret that nobody else may learn from the cache") * 3
    cached = []
    for salt in ("a", "a", "b", None):
        llm.add_request(prompt, GREEDY, cache_salt=salt)
        while llm.has_unfinished():
            finished = llm.step()
        cached.append(finished[0].num_cached_tokens > 0)
    assert cached == [False, True, False, False]


def test_nan_logits_end_that_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("The fox", GREEDY, use_tqdm=False)[0]["text"]
    compute = llm._runner.model.compute_logits

    def poisoned(hidden: torch.Tensor, kernels: Kernels, *ranks: object) -> torch.Tensor:
        logits = compute(hidden, kernels)
        if len(logits) == 2:
            logits[1] = torch.nan
        return logits

    errors = llm.engine.stats().num_errors
    monkeypatch.setattr(llm._runner.model, "compute_logits", poisoned)
    healthy, sick = llm.generate(["The fox", "The hen"], GREEDY, use_tqdm=False)
    assert healthy["text"] == expected
    assert sick.finish_reason == "error"
    assert "NaN" in str(sick.stop_reason)
    assert llm.engine.stats().num_errors == errors + 1


def test_a_failed_step_raises_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(llm._runner.model, "compute_logits", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    llm.step()
    assert llm.generate("The fox", GREEDY, use_tqdm=False)[0].finish_reason is not None


def test_a_model_without_a_tokenizer_takes_ids(checkpoint: Callable[[str], Path]) -> None:
    with LLM(str(checkpoint("llama"))) as llm:
        output = llm.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)[0]
        assert len(output["token_ids"]) == 4
        assert output["text"] == ""
        with pytest.raises(ValueError, match=r"needs a tokenizer.*give token ids"):
            llm.generate("text", use_tqdm=False)


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    written = json.loads((DEMO_MODEL / "generation_config.json").read_text())
    params = llm.default_sampling_params()
    assert (params.temperature, params.top_p) == (written["temperature"], written["top_p"])
    assert params.max_tokens == 16


def test_a_closed_llm_says_so_and_its_streams_end_quietly(
    checkpoint: Callable[[str], Path],
) -> None:
    llm = LLM(str(checkpoint("qwen3")))
    stream = llm.stream([1, 2], SamplingParams(max_tokens=50))
    next(stream)
    llm.close()
    llm.close()
    del stream
    gc.collect()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1], use_tqdm=False)


def test_max_model_len_is_fitted_to_the_blocks(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(checkpoint("qwen3")), num_kv_blocks=4, block_size=8) as llm:
        assert llm.engine.max_model_len == 32
    assert "lowered from 512 to 32" in caplog.text


def test_a_stream_ends_when_its_request_is_aborted_or_stepped_elsewhere(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    seen = []
    for output in llm.stream("The fox", params):
        seen.append(output.finish_reason)
        llm.abort(output.request_id)
    assert seen == [None, "abort"]
    stream = llm.stream("The fox", params)
    while llm.has_unfinished():
        llm.step()
    assert [out.finish_reason for out in stream] == ["length"]


def test_a_stream_that_is_never_read_leaves_nothing(llm: LLM) -> None:
    llm.stream("The fox", SamplingParams(max_tokens=30)).close()
    llm.stream("The fox", SamplingParams(max_tokens=30))
    gc.collect()
    assert not llm.has_unfinished()


def test_snapshots_of_a_stream_stand_still(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)
    outputs = [out.outputs[0] for out in llm.stream("The fox", params)]
    assert [len(out.logprobs or []) for out in outputs] == [1, 2, 3, 4, 5]
    assert [len(out.token_ids) for out in outputs] == [1, 2, 3, 4, 5]


def test_huge_values_harm_nobody() -> None:
    """They come to the same as what they mean, and batch mates do not notice."""
    params = SamplingParams(top_k=2**63, max_tokens=3, logprobs=20)
    huge = SamplingParams(min_tokens=2**63, max_tokens=2**64, ignore_eos=True, stop=["a", "e"])
    with LLM(max_model_len=64) as llm:
        outputs = llm.generate(["The fox", "The hen"], [params, huge], use_tqdm=False)
    assert [out.finish_reason for out in outputs] == ["length", "length"]


def test_an_end_of_text_id_beyond_the_vocabulary_is_no_harm(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 32000, -1]}')
    with LLM(str(directory)) as llm:
        params = SamplingParams(min_tokens=3, max_tokens=3)
        assert len(llm.generate([1], params, use_tqdm=False)[0]["token_ids"]) == 3


def test_a_mistyped_template_is_no_missing_tokenizer() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jinja"):
        LLM(chat_template="./missing.jinja")


def test_unknown_options_of_a_chat_are_refused(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(TypeError, match="temperature"):
        llm.chat(messages, GREEDY, use_tqdm=False, temperature=0)
    rendered = llm.render(messages, chat_template="{{ mood }}", chat_template_kwargs={"mood": "x"})
    assert rendered == "x"


def test_messages_come_in_openais_form(llm: LLM) -> None:
    parts = ["Look:", {"type": "text", "text": "5"}, {"type": "refusal", "refusal": "No."}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    blank = {"function": {"name": "g", "arguments": ""}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        said,
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "assistant", "tool_calls": (blank,)},
        {"role": "assistant", "content": "None.", "tool_calls": []},
    ]
    before = copy.deepcopy(messages)
    read = json.loads(llm.render(messages, chat_template="{{ messages | tojson }}"))
    decoded = {**call, "function": {"name": "f", "arguments": {"a": [1]}}}
    assert read == [
        {"role": "user", "content": "Look:\n5\nNo."},
        {"role": "assistant", "content": "", "tool_calls": [decoded]},
        messages[2],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "g", "arguments": {}}}],
        },
        {"role": "assistant", "content": "None."},
    ]
    assert messages == before
    assert llm.render(read) == llm.render(messages)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        (5, "messages"),
        ("Hi", "messages"),
        ([5], "messages"),
        ({"role": "user", "content": "Hi"}, "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any, param: str) -> None:
    for ask in (llm.render, llm.chat, llm.stream_chat):
        with pytest.raises(InvalidRequestError) as caught:
            ask(messages)
        assert caught.value.param == param


@pytest.mark.parametrize("text", ["\ud800", "a" * 5000 + "\ud800", 5])
def test_what_is_no_text_has_no_tokens(llm: LLM, text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="text must be valid Unicode text"):
        llm.encode(text)


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty prompt": ("", {}, "the prompt is empty: give at least one token"),
    "empty ids": ([[]], {}, "the prompt is empty: give at least one token"),
    "id out of range": ([1, 4096], {}, "token id 4096 in prompt is out of range.*0 to 4095"),
    "negative id": ([-1], {}, "token id -1 in prompt is out of range.*0 to 4095"),
    "too long": ([1] * 5000, {}, "maximum context length is 4096 tokens.*prompt alone has 5000"),
    "not a prompt": ([3.5], {}, "a prompt is a string or a list of token ids"),
    "max_tokens": ("a", {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    "temperature": ("a", {"temperature": -1}, "temperature must be non-negative.*got -1"),
    "top_p zero": ("a", {"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
    "top_p above one": ("a", {"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    "top_k": ("a", {"top_k": -2}, r"top_k must be 0 or -1 \(all\), or at least 1, got -2"),
    "n": ("a", {"n": 0}, "n must be at least 1, got 0"),
    "nothing": (None, {}, "prompts must be a prompt or a list of them, got None"),
    "bytes": (b"abc", {}, "a prompt is a string or a list of token ids, got b'abc'"),
    "truth values": ([[True]], {}, "a prompt is a string or a list of token ids"),
    "unknown mapping": ({"promt": "x"}, {}, "a prompt mapping has 'prompt' or"),
    "only a salt": ({"cache_salt": "x"}, {}, "a prompt mapping has 'prompt' or"),
    "salt": ({"prompt": "a", "cache_salt": 1}, {}, "cache_salt must be a string, got 1"),
    "surrogates": ("a\udcff", {}, "prompt must be valid Unicode text, got"),
    "half a bad word": ("a", {"bad_words": ["\ud800"]}, "bad_words must be valid Unicode text"),
    "too many bad words": (
        "a",
        {"bad_words": [f"{i} " * 50 for i in range(128)]},
        "bad_words are too much to look for at each step: 256 spellings of up to",
    ),
    "temperature as text": ("a", {"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    "fractional tokens": ("a", {"max_tokens": 2.5}, "max_tokens must be an integer, got 2.5"),
    "truth as text": ("a", {"ignore_eos": "false"}, "ignore_eos must be True or False, got 'fal"),
    "stop": ("a", {"stop": 5}, "stop must be a string or a list of strings, got 5"),
    "stop ids": ("a", {"stop_token_ids": 2}, "stop_token_ids must be a list of integers, got 2"),
    "empty stop": ("a", {"stop": [""]}, "stop must be non-empty strings"),
    "bias out of range": ("a", {"logit_bias": {9999: 1.0}}, "token id 9999 in logit_bias"),
    "too many allowed": ("a", {"allowed_token_ids": [1] * 4097}, "allowed_token_ids has 4097 tok"),
    "allowed out of range": ("a", {"allowed_token_ids": [-3]}, "token id -3 in allowed_token_ids"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_request_is_told_and_loses_nothing(llm: LLM, mistake: str) -> None:
    prompt, fields, message = MISTAKES[mistake]
    other = llm.add_request("The fox", GREEDY)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, SamplingParams(**fields), use_tqdm=False)
    while llm.has_unfinished():
        news = llm.step()
    assert news[0].request_id == other
    assert news[0].finish_reason in ("stop", "length")


def test_threads_do_not_meet(llm: LLM) -> None:
    """A call beside another thread's is refused; neither that one nor a later one suffers."""
    expected = llm.generate("The fox", GREEDY, use_tqdm=False)[0]["text"]
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    stream = llm.stream("A king", params)
    next(stream)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(llm.generate, "Once", params, use_tqdm=False)
        while llm.engine.stats().num_running < 2:
            time.sleep(0.001)
        for call in (
            llm.step,
            lambda: llm.generate("A"),
            stream.__next__,
            lambda: llm.abort("0"),
            llm.close,
        ):
            with pytest.raises(RuntimeError, match="another thread is using this LLM"):
                call()
        del stream  # it cannot be aborted now, and is with the next step
        gc.collect()
        assert len(running.result(60)[0]["token_ids"]) == 300
        assert llm.generate("The fox", GREEDY, use_tqdm=False)[0]["text"] == expected
        again = other.submit(llm.generate, "The fox", GREEDY, use_tqdm=False)
        assert again.result(60)[0]["text"] == expected


def test_a_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    """Tokenizers may have such tokens: a prompt with one is refused, and none is ever written."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    image = {"id": 4096, "content": "<image>", "special": True, "normalized": False}
    settings["added_tokens"].append(
        image | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    llm = LLM(tokenizer=str(tmp_path), dtype="float32")
    for ask in (llm.generate, llm.embed):
        with pytest.raises(InvalidRequestError, match="token id 4096 in prompt is out of range"):
            ask("An <image> of", use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="token id 4096 in prompt is out of range"):
        llm.chat([{"role": "user", "content": "<image>"}], GREEDY, use_tqdm=False)
    plain = llm.generate("The fox", GREEDY, use_tqdm=False)[0]
    params = SamplingParams(temperature=0, max_tokens=12, bad_words=["<image>", "a <image>"])
    assert llm.generate("The fox", params, use_tqdm=False)[0]["text"] == plain["text"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_model_that_does_not_fit_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load_model", load)
    with pytest.raises(NotEnoughMemoryError, match="quantize the model") as told:
        LLM()
    assert told.value.__cause__ is error


def test_a_cache_that_does_not_fit_is_told() -> None:
    with pytest.raises(NotEnoughMemoryError, match="lower num_kv_blocks"):
        LLM(num_kv_blocks=10**10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "/no/such/place"}, FileNotFoundError, "/no/such/place"),
        (
            {"max_num_sqs": 4},
            ValueError,
            "unknown option 'max_num_sqs'; did you mean 'max_num_seqs'",
        ),
        (
            {"max_model_len": 5000},
            ValueError,
            "max_model_len=5000 exceeds the model's context of 4096",
        ),
        ({"dtype": "int3"}, ValueError, "dtype must be one of auto, float32"),
        ({"max_num_seqs": "32"}, ValueError, "max_num_seqs must be an integer, got '32'"),
        ({"enable_prefix_caching": "no"}, ValueError, "must be True or False, got 'no'"),
        ({"num_kv_blocks": 0}, ValueError, "num_kv_blocks must be at least 1, got 0"),
        ({"device": "cuda"}, ValueError, "device 'cuda' is not available here; available: cpu"),
        ({"kv_cache_memory_bytes": 10}, RuntimeError, "one block needs 48 KiB: free memory"),
    ],
)
def test_a_mistake_in_the_options_is_told(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(error, match=message):
        LLM(**options)


def test_a_model_that_speaks_is_sent_elsewhere(speech_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="AsyncSpeech"):
        LLM(str(speech_checkpoint("v1")), device="cpu")
