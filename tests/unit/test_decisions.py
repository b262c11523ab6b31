"""Decisions: labels that are one token, the probabilities behind them, and the scores they need."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.config import DEMO_MODEL
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import Logprob
from nanovllm.text.decisions import (
    BY_DIGIT,
    BY_LETTER,
    YES_OR_NO,
    Decision,
    Labelling,
    Labels,
    Option,
    Question,
)
from nanovllm.text.tokenizer import Tokenizer

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO_MODEL)


def question(labelling: Labelling, num_options: int) -> Question:
    options = [Option(f"number {i}") for i in range(num_options)]
    return Question("Which?", options, labelling, "questions.7")


@pytest.mark.parametrize(("labelling", "num"), [(BY_LETTER, 2), (BY_LETTER, 26), (BY_DIGIT, 10)])
@pytest.mark.parametrize("ending", ["assistant\n", "</think>\n\n", "[/INST]", "king."])
def test_labels_are_one_token_each(
    tokenizer: Tokenizer, labelling: Labelling, num: int, ending: str
) -> None:
    prompt = "A long tale of a " * 20 + ending
    text, token_ids = Labels(tokenizer, prompt).of(question(labelling, num))
    labels = [line.partition(":")[0] for line in text.split("\n")[1:-1]]
    assert labels == list(labelling.labels[:num])
    assert len({i for ids in token_ids for i in ids}) == sum(map(len, token_ids))
    before = tokenizer.encode(prompt, False)
    for label, ids in zip(labels, token_ids, strict=True):
        for token_id in ids:
            spellings = [tokenizer.encode(prompt + s + label, False) for s in ("", " ")]
            assert [*before, token_id] in spellings


def test_labels_of_several_tokens_are_passed_over(tokenizer: Tokenizer) -> None:
    labelling = Labelling(("A", "Rumpelstiltskin", "B"), "Say it.")
    text = Labels(tokenizer, "x\n").of(question(labelling, 2)).text
    assert text == "Which?\nA: number 0\nB: number 1\nSay it."
    fallen_back = Labels(tokenizer, "x\n").of(question(labelling, 3)).text
    assert fallen_back.split("\n")[1:4] == ["A: number 0", "B: number 1", "C: number 2"]
    with pytest.raises(InvalidRequestError, match=r"5000 answers, .* ask with fewer") as error:
        Labels(tokenizer, "x\n").of(question(BY_LETTER, 5000))
    assert error.value.param == "questions.7"


def test_yes_and_no_may_have_no_tokens(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    asked = Question.whether("True?", "questions", no="It lies.")
    text = Labels(tokenizer, "x\n").of(asked).text
    assert text == "True?\nyes\nno: It lies.\nReply with yes or no, and with nothing else."

    def apart(self: Tokenizer, text: str, special: bool = True) -> list[int]:
        return encode(self, text.replace("yes", "y.e.s"), special)

    monkeypatch.setattr(Tokenizer, "encode", apart)
    assert asked.text(YES_OR_NO, ["yes", "no"]) == (
        "True?\nyes\nno: It lies.\nReply with yes or no, and with nothing else."
    )
    lettered = Labels(tokenizer, "x\n").of(asked)
    assert lettered.text.split("\n")[1:3] == ["A: yes", "B: no - It lies."]


def test_labels_are_looked_up_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, texts = Tokenizer.encode, []

    def counted(self: Tokenizer, text: str, special: bool = True) -> list[int]:
        texts.append(text)
        return encode(self, text, special)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    labels = Labels(tokenizer, "x\n")
    for _ in range(400):
        labels.of(question(BY_LETTER, 26))
        labels.of(question(BY_DIGIT, 10))
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["B", "A"], ["B", "A"]),
        (["1", "2", "10"], ["A", "B", "C"]),
        (["C", "C"], ["A", "B"]),
        (["wolf", "A"], ["A", "B"]),
    ],
)
def test_answers_that_are_labels_are_their_own(
    tokenizer: Tokenizer, names: list[str], labels: list[str]
) -> None:
    asked = Question("Which?", [Option(name) for name in names])
    lines = Labels(tokenizer, "x\n").of(asked).text.split("\n")[1:-1]
    assert [line[0] for line in lines] == labels
    assert all(("A: B" not in line) for line in lines)


def test_labels_that_would_grow_into_what_is_before_them_are_none(tokenizer: Tokenizer) -> None:
    (before,), (_,) = (tokenizer.encode(text, False) for text in ("th", "the"))
    apart = tokenizer.encode("th e", False)
    assert apart[0] == before
    labelled = Labels(tokenizer, "th").of(question(Labelling(("e",), ""), 1))
    assert labelled.token_ids == [apart[1:]]


def test_a_question_as_the_model_reads_it() -> None:
    options = [Option("left", "where the heart is"), Option("right"), Option("", "neither")]
    asked = Question("Where to?", options)
    assert asked.text(Labelling((), "Say which."), ["A", "B", "C"]).split("\n") == [
        *("Where to?", "A: left - where the heart is", "B: right", "C: neither", "Say which.")
    ]
    assert Question("", options[1:2]).text(BY_LETTER, ["A"]).split("\n")[0] == "A: right"


def scores(**shares: float) -> dict[int, Logprob]:
    return {int(key[1:]): Logprob(math.log(p) if p else -math.inf) for key, p in shares.items()}


def test_probabilities_are_those_among_the_labels() -> None:
    decided = Decision.of(scores(t5=0.1, t6=0.3, t7=0.2), [[5], [6], [7]], 6)
    assert decided.probabilities == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert decided.label_mass == pytest.approx(0.6)
    assert decided.best == 1
    assert decided.confidence == pytest.approx(0.3)
    assert decided.score == pytest.approx(7 / 6)
    assert decided.argmax_is_label
    assert not Decision.of(scores(t5=0.1, t6=0.3), [[5], [6]], 8).argmax_is_label
    both = Decision.of(scores(t5=0.1, t6=0.3, t7=0.2), [[5, 7], [6]], 7)
    assert both.probabilities == pytest.approx([0.5, 0.5])
    assert both.argmax_is_label


def test_labels_that_cannot_be_decide_nothing() -> None:
    decided = Decision.of(scores(t5=0.0, t6=0.0), [[5], [6]], 8)
    assert (decided.probabilities, decided.label_mass) == ([0.5, 0.5], 0.0)
    assert Decision.of({5: Logprob(1e-7)}, [[5]], 5).label_mass == 1.0


class TestScores:
    """`logprob_token_ids`, which decisions are made of."""

    @pytest.mark.parametrize("options", [{}, {"cpu_isa": "torch"}, {"async_scheduling": False}])
    def test_they_are_those_of_the_whole_vocabulary(
        self, checkpoint: Callable[[str], Path], options: dict[str, Any]
    ) -> None:
        directory = checkpoint("qwen3")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        wanted: list[list[int] | None] = [[7, 319, 0], [5], None, list(range(256)), None]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=3,
                ignore_eos=True,
                logprob_token_ids=ids,
                logprobs=2 if index == 2 else None,
            )
            for index, ids in enumerate(wanted)
        ]
        with LLM(str(directory), dtype="float32", max_model_len=64, **options) as llm:
            outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
        for ids, output in zip(wanted, outputs, strict=True):
            completion = output.outputs[0]
            logits = model(torch.tensor([PROMPT + completion.token_ids[:-1]])).logits[0]
            expected = logits[len(PROMPT) - 1 :].log_softmax(-1)
            if ids is None:
                assert completion.logprobs is None or len(completion.logprobs[0]) == 2
                continue
            assert completion.logprobs is not None
            for position, found in enumerate(completion.logprobs):
                sampled = completion.token_ids[position]
                assert found.keys() == {sampled, *ids}
                assert found[sampled].rank == 1
                for token_id in ids:
                    logprob = found[token_id]
                    assert logprob.rank == (1 if token_id == sampled else None)
                    value = expected[position, token_id].item()
                    assert logprob.logprob == pytest.approx(value, abs=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"logprob_token_ids": []}, "1 to 1024 different ids"),
            ({"logprob_token_ids": [3, 3]}, "1 to 1024 different ids"),
            ({"logprob_token_ids": list(range(1025))}, "1 to 1024 different ids"),
            ({"logprob_token_ids": [3], "logprobs": 5}, "logprobs must be left out"),
        ],
    )
    def test_what_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidRequestError, match=message):
            SamplingParams(**options)

    def test_ids_must_be_there(self, checkpoint: Callable[[str], Path]) -> None:
        with (
            LLM(str(checkpoint("qwen3")), dtype="float32", max_model_len=64) as llm,
            pytest.raises(InvalidRequestError, match="320 in logprob_token_ids is out of range"),
        ):
            llm.generate(PROMPT, SamplingParams(logprob_token_ids=[320]), use_tqdm=False)
