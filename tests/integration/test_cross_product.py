"""Every sampling parameter times every feature of the engine, generated.

CVE-2026-44223: a penalty together with a mode of the engine ended it for everybody. So there is no
list of combinations here that somebody thought of: a covering array has every pair of values of two
parameters, and each of its rows runs with each feature, in engines of every kind.
"""

import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from nanovllm import LLM, CompletionOutput, LoRARequest, RequestOutput, SamplingParams
from nanovllm.config import DEMO_MODEL
from nanovllm.sampling_params import StructuredOutputsParams
from tests.conftest import make_checkpoint
from tests.covering import Row, covering_array
from tests.peft_oracle import EVERY_LAYER, write_peft

VOCAB_SIZE = 4103
"""A few rows more than the tokenizer has tokens, as in many a checkpoint."""
EOS = 4093
MAX_MODEL_LEN = 64
BLOCK_SIZE = 8
NUM_SEQS = 8

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "green", 3]}},
    "required": ["ok", "colour"],
    "additionalProperties": False,
}
PATTERN = r"[a-f]{2,6}-(left|right)"
CHOICE = ["yes", "no", "perhaps not"]
LARK = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,4}/\n'
TAG = {
    "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}],
    "triggers": ["<a>"],
}

VALUES: dict[str, list[Any]] = {
    "n": [1, 3],
    "presence_penalty": [0.0, 2.0, -2.0],
    "frequency_penalty": [0.0, 2.0, -2.0],
    "repetition_penalty": [1.0, 1.5, 1e-6, 1e300, 1e-300],
    "temperature": [1.0, 0.0, 0.2, 1e-4, 1e300],
    "top_p": [1.0, 0.5, 1e-9],
    "top_k": [0, -1, 1, 7, 10**9],
    "min_p": [0.0, 0.2, 1.0],
    "seed": [1, 0, -1, 2**64 - 1, None],
    "stop": [None, "e", ["zz", " a", "\u00e9"]],
    "stop_token_ids": [None, [], [5, VOCAB_SIZE - 1], list(range(0, VOCAB_SIZE, 20))],
    "ignore_eos": [False, True],
    "max_tokens": [10, 1, None],
    "min_tokens": [0, 1, 9],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "logprob_token_ids": [None, [EOS], [VOCAB_SIZE - 1, 0, 7], list(range(30, 330))],
    "detokenize": [True, False],
    "skip_special_tokens": [True, False],
    "spaces_between_special_tokens": [True, False],
    "include_stop_str_in_output": [False, True],
    "truncate_prompt_tokens": [None, 1, 20, -1],
    "bad_words": [None, "the", ["a", "Once upon", "{"]],
    "logit_bias": [None, {7: 100.0}, {EOS: -1e30, 9: 3e38}, dict.fromkeys(range(300), 5.0)],
    "allowed_token_ids": [None, [9], list(range(40, 400)), list(range(VOCAB_SIZE))],
}
"""Those of each field that are worth a try; the first one is harmless."""

FEATURES: dict[str, Row] = {
    "none": {},
    "lora": {"lora": True},
    "n": {"n": 2},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    "regex": {"structured_outputs": StructuredOutputsParams(regex=PATTERN), "lora": True, "n": 2},
    "choice": {"structured_outputs": StructuredOutputsParams(choice=CHOICE), "logprobs": 2},
    "grammar": {"structured_outputs": StructuredOutputsParams(grammar=LARK), "n": 2},
    "object": {"structured_outputs": StructuredOutputsParams(json_object=True)},
    "tag": {"structured_outputs": StructuredOutputsParams(structural_tag=TAG)},
}
"""What a request asks for besides; it goes before the row's own values."""

ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "cpu_threads": 1,
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": NUM_SEQS,
    "max_num_batched_tokens": 256,
    "block_size": BLOCK_SIZE,
    "num_kv_blocks": 256,
    "enable_lora": True,
    "max_loras": 2,
    "async_scheduling": False,
}
CHUNKS = {"max_num_batched_tokens": NUM_SEQS}
TINY_POOL = {"num_kv_blocks": MAX_MODEL_LEN // BLOCK_SIZE + 2}
AHEAD = {"async_scheduling": True}
KINDS: list[Row] = [
    one | other | third
    for one, other, third in itertools.product(({}, CHUNKS), ({}, TINY_POOL), ({}, AHEAD))
]
MORE_KINDS: list[Row] = [
    {"enable_prefix_caching": False},
    {"disable_cascade_attn": True},
    {"deterministic": True},
    {"cpu_isa": "torch"},
    {"cpu_isa": "torch"} | CHUNKS | TINY_POOL | AHEAD,
    {"dtype": "bfloat16"} | TINY_POOL,
    {"quantization": "int8"} | CHUNKS,
    {"quantization": "int4"} | AHEAD,
    {"kv_cache_dtype": "int8"} | TINY_POOL,
    {"max_num_seqs": 1, "max_num_batched_tokens": 1} | AHEAD,
]


Run = Callable[[list["Request"], Row], list[RequestOutput]]


class Request(NamedTuple):
    """A combination: its number, its feature's name and what it asks for."""

    number: int
    feature: str
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None

    @property
    def is_certain(self) -> bool:
        """Whether it must get the same tokens whenever it is asked."""
        return self.params.seed is not None or self.params.temperature == 0.0


def possible(row: Row) -> bool:
    """Whether parameters go together; what does not is refused, as other tests show."""
    row = {name: values[0] for name, values in VALUES.items()} | row
    if row["min_tokens"] > (row["max_tokens"] or MAX_MODEL_LEN):
        return False
    if row["stop"] is not None and not row["detokenize"]:
        return False
    if row["truncate_prompt_tokens"] == -1 and row["max_tokens"] is None:
        return False  # what is left for the output is one token
    if row["logprob_token_ids"] is not None and row["logprobs"] is not None:
        return False
    allowed = row["allowed_token_ids"]
    stops = {EOS, *(row["stop_token_ids"] or ())}
    return allowed is None or row["min_tokens"] == 0 or not stops.issuperset(allowed)


def rows(every_pair: bool) -> list[Row]:
    """Each value by itself, or else each pair of values."""
    if every_pair:
        return covering_array(VALUES, possible)
    return [{}] + [{name: value} for name, values in VALUES.items() for value in values[1:]]


def make_prompt(number: int) -> list[int]:
    """Token ids, of which some prompts share the first two blocks and a half."""
    made = random.Random(number)
    shared = random.Random(number % 3).choices(range(4000), k=20)
    return shared + made.choices(range(4000), k=made.randrange(1, 20))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the bundled model's tokenizer."""
    directory = tmp_path_factory.mktemp("crossed")
    make_checkpoint(directory, "Qwen3", vocab_size=VOCAB_SIZE, head_dim=32, eos_token_id=EOS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    """More than fit into a step."""
    directory = tmp_path_factory.mktemp("adapters")
    paths = [
        write_peft(base, directory / str(number), seed=number, r=2 + number, modules=EVERY_LAYER)
        for number in range(1, 4)
    ]
    return [LoRARequest(path.name, int(path.name), str(path)) for path in paths]


def requests_of(made_of: list[Row], adapters: list[LoRARequest]) -> list[Request]:
    """The product of rows and features, in an order in which neighbours have little in common."""
    product = [(row, feature) for row in made_of for feature in FEATURES]
    random.Random(0).shuffle(product)
    requests = []
    for number, (row, feature) in enumerate(product):
        asked: Row = {"max_tokens": 10, "seed": number} | FEATURES[feature] | row
        if asked.get("logprob_token_ids") is not None:
            asked.pop("logprobs", None)  # these two exclude each other
        lora = adapters[number % len(adapters)] if asked.pop("lora", False) else None
        prompt = make_prompt(number)
        requests.append(Request(number, feature, prompt, SamplingParams(**asked), lora))
    return requests


@pytest.fixture(scope="module")
def run(base: Path) -> Run:
    """Return a function that runs requests in an engine of a kind, and then again."""

    def run_requests(requests: list[Request], kind: Row) -> list[RequestOutput]:
        with LLM(str(base), **ENGINE | kind) as llm:
            first, again = (
                llm.generate(
                    [request.prompt for request in requests],
                    [replace(request.params) for request in requests],
                    use_tqdm=False,
                    lora_request=[request.lora for request in requests],
                )
                for _ in range(2)
            )
            check_engine(llm, kind)
            for request, output, repeated in zip(requests, first, again, strict=True):
                check_output(llm, request, output)
                check_output(llm, request, repeated)
                if request.is_certain and ENGINE | kind == ENGINE | kind | {"dtype": "float32"}:
                    assert tokens(output) == tokens(repeated), request
            return first

    return run_requests


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def check_engine(llm: LLM, kind: Row) -> None:
    """Nothing is left behind, and what the kind is for did happen."""
    stats = llm.engine.stats()
    assert not llm.has_unfinished()
    assert stats.num_running == stats.num_waiting == stats.num_used_blocks == stats.num_errors == 0
    assert llm.engine.scheduler.num_free_slots == llm.config.max_num_seqs
    if "num_kv_blocks" in kind:
        assert stats.num_preemptions > 0
    elif kind.get("enable_prefix_caching", True):
        assert stats.num_cached_tokens > 0


def check_output(llm: LLM, request: Request, output: RequestOutput) -> None:
    """What holds for every answer, whatever was asked."""
    params = request.params
    assert output.finished
    assert len(output.outputs) == params.n
    assert [completion.index for completion in output.outputs] == list(range(params.n))
    kept = params.truncate_prompt_tokens
    if kept is None:
        assert output.prompt_token_ids == request.prompt
    else:
        kept = kept if kept > 0 else MAX_MODEL_LEN - (params.max_tokens or 1)
        assert output.prompt_token_ids == request.prompt[-kept:]
    for completion in output.outputs:
        check_end(request, completion, len(output.prompt_token_ids))
        check_tokens(request, completion)
        check_text(llm, request, completion)
        if params.structured_outputs is not None:
            check_form(llm, request, completion)
    check_scores(request, output)


def check_end(request: Request, completion: CompletionOutput, num_prompt: int) -> None:
    """The reason is right, and the number of tokens goes with it."""
    params, count = request.params, len(completion.token_ids)
    room = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - num_prompt)
    assert completion.finish_reason in ("stop", "length"), (request, completion)
    assert 0 < count <= room, (request, completion)
    if completion.finish_reason == "length":
        assert count == room, (request, completion)
        assert completion.stop_reason is None
    if params.structured_outputs is None:
        assert count >= min(params.min_tokens, room), (request, completion)
        if params.ignore_eos and completion.finish_reason == "stop":
            assert completion.stop_reason is not None, (request, completion)


def check_tokens(request: Request, completion: CompletionOutput) -> None:
    """Only tokens that may be there."""
    params = request.params
    assert all(0 <= token_id < VOCAB_SIZE for token_id in completion.token_ids)
    if params.allowed_token_ids is not None and params.structured_outputs is None:
        assert set(completion.token_ids) <= set(params.allowed_token_ids), (request, completion)
    if isinstance(completion.stop_reason, int):
        assert completion.stop_reason in (params.stop_token_ids or ())
        assert completion.token_ids[-1] == completion.stop_reason


def check_text(llm: LLM, request: Request, completion: CompletionOutput) -> None:
    """Nothing if none is asked for; no stop string, but maybe at the end."""
    params, text = request.params, completion.text
    if not params.detokenize:
        assert text == ""
        return
    assert llm.decode(completion.token_ids, params.skip_special_tokens).startswith(text)
    if isinstance(completion.stop_reason, str):
        assert completion.stop_reason in params.stop_strings
        assert text.endswith(completion.stop_reason) == params.include_stop_str_in_output
        text = text.removesuffix(completion.stop_reason)
    if params.min_tokens == 0 and params.skip_special_tokens:
        assert not any(stop in text for stop in params.stop_strings), (request, completion)


def check_scores(request: Request, output: RequestOutput) -> None:
    """One entry for each token, with as many alternatives as were asked for."""
    params = request.params
    for completion in output.outputs:
        if params.num_logprobs is None:
            assert completion.logprobs is None
            continue
        assert completion.logprobs is not None
        check_entries(completion.token_ids, completion.logprobs, params.num_logprobs, request)
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            if params.logprob_token_ids is not None:
                assert entry.keys() == {token_id, *params.logprob_token_ids}, request
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs is not None
    nothing, *entries = output.prompt_logprobs
    assert nothing is None
    check_entries(output.prompt_token_ids[1:], entries, params.prompt_logprobs, request)


def check_entries(token_ids: list[int], entries: list[Any], num_top: int, request: Request) -> None:
    assert len(entries) == len(token_ids), request
    for token_id, entry in zip(token_ids, entries, strict=True):
        assert token_id in entry
        assert max(num_top, 1) <= len(entry) <= num_top + 1
        assert all(score.logprob <= 0 for score in entry.values()), request


def check_form(llm: LLM, request: Request, completion: CompletionOutput) -> None:
    """An output that came to its own end has the form that it must have."""
    if completion.finish_reason != "stop" or completion.stop_reason is not None:
        return
    text = llm.decode(completion.token_ids)
    problem = f"{text!r} of {request}"
    if request.feature == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif request.feature == "object":
        assert isinstance(json.loads(text), dict), problem
    elif request.feature == "regex":
        assert re.fullmatch(PATTERN, text), problem
    elif request.feature == "choice":
        assert text in CHOICE, problem
    elif request.feature == "grammar":
        assert re.fullmatch(r"\(*[0-9]{1,4}\)*", text), problem
        assert text.count("(") == text.count(")"), problem
    elif request.feature == "tag":
        for inside in re.findall("<a>(.*?)</a>", text, re.DOTALL):
            jsonschema.validate(json.loads(inside), SCHEMA)


def test_every_field_has_values() -> None:
    names = {each.name for each in fields(SamplingParams) if each.init}
    assert names == {*VALUES, "structured_outputs"}
    for name, values in VALUES.items():
        assert possible({name: values[0]})
        assert len(values) >= 2


def test_the_array_has_every_pair() -> None:
    found = covering_array(VALUES, possible)
    assert len(found) < 80
    assert all(possible(row) for row in found)
    for one, other in itertools.combinations(VALUES, 2):
        for value, beside in itertools.product(VALUES[one], VALUES[other]):
            if possible({one: value, other: beside}):
                assert any(row[one] == value and row[other] == beside for row in found)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=str)
def test_each_value_with_each_feature(run: Run, adapters: list[LoRARequest], kind: Row) -> None:
    run(requests_of(rows(every_pair=False), adapters), kind)


@pytest.mark.slow
def test_each_pair_with_each_feature(run: Run, adapters: list[LoRARequest]) -> None:
    """In every kind of engine a request gets the same tokens."""
    requests = requests_of(rows(every_pair=True), adapters)
    expected = run(requests, KINDS[0])
    for kind in KINDS[1:]:
        outputs = run(requests, kind)
        for request, output, known in zip(requests, outputs, expected, strict=True):
            if request.is_certain:
                assert tokens(output) == tokens(known), (kind, request)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE_KINDS, ids=str)
def test_each_pair_in_other_engines(run: Run, adapters: list[LoRARequest], kind: Row) -> None:
    run(requests_of(rows(every_pair=True), adapters), kind)


@pytest.mark.parametrize("kind", [TINY_POOL, CHUNKS | AHEAD], ids=str)
def test_aborts_at_any_moment_leave_nothing(
    base: Path, adapters: list[LoRARequest], kind: Row
) -> None:
    made = random.Random(0)
    waiting = requests_of(rows(every_pair=False), adapters)
    made.shuffle(waiting)
    del waiting[200:]
    with LLM(str(base), **ENGINE | kind) as llm:
        open_ids: list[str] = []
        while waiting or llm.has_unfinished():
            for _ in range(min(len(waiting), made.randrange(8))):
                request = waiting.pop()
                open_ids.append(
                    llm.add_request(request.prompt, request.params, lora_request=request.lora)
                )
            for output in llm.step():
                assert "error" not in {each.finish_reason for each in output.outputs}
            if open_ids and made.random() < 0.2:
                llm.abort(open_ids.pop(made.randrange(len(open_ids))))
        check_engine(llm, kind)
