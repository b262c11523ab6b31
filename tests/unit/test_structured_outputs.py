"""Outputs of a given form, from the engine in this process."""

import gc
import json
import re
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from llguidance.numpy import fill_next_token_bitmask_par

from nanovllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from nanovllm.batch import LOST_GRAMMAR
from nanovllm.config import DEMO_MODEL
from nanovllm.errors import InvalidRequestError
from nanovllm.runners import grammar as runner_grammar
from nanovllm.runners.grammar import MAX_DIGITS, MAX_TIME_OVER, Account, SlotGrammar
from tests.random_schemas import random_schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["wizard", "witch"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 300},
        "friends": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "friends"],
}
PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)


def params(form: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    structured = StructuredOutputsParams(**(form or {"json": PERSON}))
    options = {"temperature": 1.5, "max_tokens": 400, "seed": 7} | options
    return SamplingParams(structured_outputs=structured, **options)


def run(llm: LLM, *given: SamplingParams) -> list[RequestOutput]:
    return llm.generate([PROMPT] * len(given), list(given), use_tqdm=False)


def check(output: RequestOutput) -> None:
    for completion in output.outputs:
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        jsonschema.validate(json.loads(completion.text), PERSON)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.2},
        {"presence_penalty": 2.0, "repetition_penalty": 3.0, "frequency_penalty": -2.0},
        {"min_tokens": 200},
        {"ignore_eos": True},
        {"bad_words": ['"', "{", "}", "wiz", "wit"]},
        {"logit_bias": dict.fromkeys(range(0, 4096, 2), -100.0)},
        {"allowed_token_ids": [5]},
        {"stop_token_ids": [4090], "include_stop_str_in_output": True},
        {"detokenize": True, "skip_special_tokens": False},
    ],
)
def test_the_form_has_its_way_whatever_else_is_asked(llm: LLM, options: dict[str, Any]) -> None:
    (output,) = run(llm, params(n=3, **options))
    check(output)
    for completion in output.outputs:
        scores = completion.logprobs
        assert scores is None or len(scores) == len(completion.token_ids)


def test_rows_of_a_step_follow_their_own_forms(llm: LLM) -> None:
    forms: list[tuple[dict[str, Any], str]] = [
        ({"regex": r"\d{3}-[a-f]{4}"}, r"\d{3}-[a-f]{4}"),
        ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"grammar": 'root ::= "<" [a-c]+ ">" | "none"'}, "<[a-c]+>|none"),
        ({"regex": "(red|green|blue)( and (red|green|blue)){2}"}, "[a-z]+ and [a-z]+ and [a-z]+"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 12}}, "1[0-2]"),
    ]
    free = SamplingParams(temperature=1.5, seed=3, max_tokens=30)
    outputs = run(llm, *(params(form) for form, _ in forms), free, params(), free)
    for (_, pattern), output in zip(forms, outputs[: len(forms)], strict=True):
        assert output.finish_reason == "stop"
        assert re.fullmatch(pattern, str(output["text"]))
    check(outputs[-2])
    # Neighbours without a form are as they are alone.
    assert outputs[-1]["token_ids"] == run(llm, free)[0]["token_ids"] == outputs[5]["token_ids"]


def test_what_a_request_gets_depends_on_its_seed_alone(llm: LLM) -> None:
    alone = [run(llm, params(seed=seed))[0]["token_ids"] for seed in range(6)]
    together = run(llm, *(params(seed=seed) for seed in range(6)))
    assert [output["token_ids"] for output in together] == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_certain_tokens_cost_no_step(llm: LLM) -> None:
    stats = llm.engine.stats()
    form = {"json": {"type": "object", "properties": {"constant": {"const": "x" * 50}}}}
    form["json"]["required"] = ["constant"]
    num_steps, num_forced, num_tokens = (
        stats.num_steps,
        stats.num_forced_tokens,
        stats.num_output_tokens,
    )
    (output,) = run(llm, params(form))
    stats = llm.engine.stats()
    assert json.loads(str(output["text"])) == {"constant": "x" * 50}
    assert output.finish_reason == "stop"
    assert stats.num_output_tokens - num_tokens == len(output["token_ids"])
    assert stats.num_forced_tokens - num_forced == len(output["token_ids"]) - 1
    assert stats.num_steps - num_steps == 1
    # Where each token's log probability is asked for, each is sampled.
    num_steps = stats.num_steps
    (scored,) = run(llm, params(form, logprobs=0))
    assert scored["text"] == output["text"]
    assert llm.engine.stats().num_steps - num_steps == len(scored["token_ids"])


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 12])
def test_the_limit_counts_forced_tokens(llm: LLM, max_tokens: int) -> None:
    (whole,) = run(llm, params())
    (cut,) = run(llm, params(max_tokens=max_tokens))
    assert cut.finish_reason == "length"
    assert cut["token_ids"] == whole["token_ids"][:max_tokens]
    (exact,) = run(llm, params(max_tokens=len(whole["token_ids"])))
    assert (exact.finish_reason, exact["text"]) == ("stop", whole["text"])


def test_stop_strings_end_a_form_within_forced_tokens(llm: LLM) -> None:
    (output,) = run(llm, params(stop=["name"]))
    assert (output["text"], output.finish_reason, output.stop_reason) == ('{"', "stop", "name")
    assert not llm.has_unfinished()


def test_streams_bring_the_same(llm: LLM) -> None:
    (whole,) = run(llm, params())
    texts = [str(output["text"]) for output in llm.stream(PROMPT, params())]
    assert texts[-1] == whole["text"]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_a_form_goes_with_steps_in_flight(llm: LLM) -> None:
    free = SamplingParams(temperature=1.5, seed=3, max_tokens=30)
    given = [params(seed=1), free, params(seed=2, logprobs=0), params({"regex": "[a-z]{20}"})]
    ahead = LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, async_scheduling=True)
    wanted, got = run(llm, *given), run(ahead, *given)
    assert [out["token_ids"] for out in got] == [out["token_ids"] for out in wanted]
    assert {out.finish_reason for out in got[::2]} == {"stop"}


def test_sequences_that_are_preempted_go_on_in_their_form(llm: LLM) -> None:
    seeds = range(8)
    wanted = run(llm, *(params(seed=seed) for seed in seeds))
    small = LLM(
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=4,
        num_kv_blocks=25,
        max_model_len=100,
    )
    got = run(small, *(params(seed=seed) for seed in seeds))
    assert small.engine.stats().num_preemptions > 0
    for output in got:
        check(output)
    assert [out["token_ids"] for out in got] == [out["token_ids"] for out in wanted]


def test_numbers_come_to_an_end(llm: LLM) -> None:
    form: dict[str, Any] = {"json": {"type": "array", "items": {"type": "number"}, "minItems": 3}}
    digits = llm.encode("7", False)
    for favourite in digits:
        given = params(form, logit_bias={favourite: 30.0}, max_tokens=300, temperature=0.5)
        (output,) = run(llm, given)
        runs = re.findall(r"\d+", str(output["text"]))
        assert len(runs) >= 3
        assert max(map(len, runs)) <= MAX_DIGITS
    # Digits in a text are the model's own business, as are those of a user's regex.
    for own in ({"json": {"type": "string", "minLength": 90, "maxLength": 90}}, {"regex": "7{90}"}):
        (output,) = run(llm, params(own, logit_bias={digits[0]: 60.0}, temperature=0.1))
        assert "7" * 60 in str(output["text"])


def test_who_loses_the_grammar_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[SlotGrammar] = []

    def take(self: SlotGrammar, token_id: int) -> list[int] | None:
        if not lost:
            lost.append(self)
        return None if self is lost[0] else original(self, token_id)

    original: Callable[[SlotGrammar, int], list[int] | None] = SlotGrammar.take
    monkeypatch.setattr(runner_grammar.SlotGrammar, "take", take)
    first, second = run(llm, params(), params())
    assert (first.finish_reason, first.stop_reason) == ("error", LOST_GRAMMAR)
    check(second)


def test_a_grammar_that_takes_too_much_time_ends_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_grammar, "MAX_TIME_OVER", 0.1)
    monkeypatch.setattr(runner_grammar, "TIME_A_TOKEN", 0.004)
    # Every text has as many readings as there are ways to put it into brackets.
    ambiguous = {"grammar": "start: a+\na: a a | /[a-z ]/ | a a a | /[a-z]+/"}
    slow, fast = run(llm, params(ambiguous, n=2, max_tokens=300), params())
    for completion in slow.outputs:
        assert (completion.finish_reason, completion.stop_reason) == ("error", LOST_GRAMMAR)
        assert len(completion.token_ids) < 300
    check(fast)


def test_sequences_share_what_a_grammar_may_take(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []
    charge = Account.charge

    def watch(self: Account, seconds: float, allowance: float = 0.0) -> None:
        if allowance:
            allowed.append(allowance)
        charge(self, seconds, allowance)

    monkeypatch.setattr(Account, "charge", watch)
    gc.collect()
    run(llm, params(n=4, max_tokens=3))
    assert max(allowed) == pytest.approx(runner_grammar.TIME_A_TOKEN / 4)
    allowed.clear()
    run(llm, params(max_tokens=3))
    assert max(allowed) == pytest.approx(runner_grammar.TIME_A_TOKEN)


def test_a_debt_is_forgiven_in_time() -> None:
    now = 0.0
    account = Account(clock=lambda: now)
    charges = [
        (0, MAX_TIME_OVER),
        (0, 1.0),
        (10, 0.0),
        (25, 0.0),
        (25, 1.0),
        (3600, 1.9),
        (3600, 1),
    ]
    overdrawn = []
    for now, seconds in charges:  # noqa: B007, it is what the clock says
        account.charge(seconds)
        overdrawn.append(account.is_overdrawn)
    assert overdrawn == [False, True, True, False, True, False, True]
    now += 60
    assert not account.is_overdrawn


def test_masks_that_threads_share_are_paid_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    charged = []
    charge = Account.charge

    def record(self: Account, seconds: float, allowance: float = 0.0) -> None:
        if not allowance:
            charged.append(seconds)
        charge(self, seconds, allowance)

    def slow(executor: Any, rows: list[Any], bits: Any) -> None:
        time.sleep(0.03)
        fill_next_token_bitmask_par(executor, rows, bits)

    monkeypatch.setattr(runner_grammar, "PARALLEL_ROWS", 3)
    monkeypatch.setattr(runner_grammar, "PARALLEL_CORES", 1)
    monkeypatch.setattr(runner_grammar, "fill_next_token_bitmask_par", slow)
    monkeypatch.setattr(Account, "charge", record)
    run(llm, params(n=3, max_tokens=1))
    assert len(charged) == 3
    assert len(set(charged)) == 1
    assert charged[0] >= 0.01


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, 'keys: ["uniqueItems"]'),
        ({"json": {"$ref": "#"}}, "no text"),
        ({"regex": "("}, "regex"),
    ],
)
def test_what_cannot_be_enforced_is_refused(llm: LLM, form: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(told)) as caught:
        run(llm, params(form))
    assert caught.value.param == next(iter(form))
    assert not llm.has_unfinished()


@pytest.mark.parametrize(
    "form",
    [{}, {"json": {}, "regex": "a"}, {"choice": []}, {"json": 5}, {"regex": b"a"}, {"choice": "a"}],
)
def test_exactly_one_form_of_the_right_type_is_given(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        StructuredOutputsParams(**form)


def test_an_end_of_text_id_that_is_text_too_is_text(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, directory)
    ids = json.dumps({"eos_token_id": [0, 2, 5]})
    (directory / "generation_config.json").write_text(ids, encoding="utf-8")
    quoting = LLM(str(directory), dtype="float32", max_num_seqs=2)
    for output in run(quoting, params(), params(seed=8)):
        check(output)


def test_a_model_without_a_tokenizer_has_no_forms(
    checkpoint: Callable[[str], Path],
) -> None:
    bare = LLM(str(checkpoint("qwen3")), dtype="float32", max_num_seqs=2, max_model_len=32)
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        bare.generate([[1, 2]], params(), use_tqdm=False)


def test_random_schemas_are_met(llm: LLM) -> None:
    schemas = [random_schema(Random(seed)) for seed in range(16)]
    given = [params({"json": schema}, seed=i, max_tokens=500) for i, schema in enumerate(schemas)]
    outputs = run(llm, *given)
    ended = [i for i, output in enumerate(outputs) if output.finish_reason == "stop"]
    assert len(ended) >= 12
    for index in ended:
        jsonschema.validate(json.loads(str(outputs[index]["text"])), schemas[index])
