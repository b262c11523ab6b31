"""Long text is split where a speaker takes a breath, and nothing of it is lost."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.audio.sentences import clean_text, split_sentences, split_voice_design

SPLITS = [
    ("Hello. World.", ["Hello. ", "World."]),
    ("One sentence", ["One sentence"]),
    ("Really?! Yes... Well.", ["Really?! ", "Yes... ", "Well."]),
    ("Dr. Smith paid $3.14 for No. 5. He left!", ["Dr. Smith paid $3.14 for No. 5. ", "He left!"]),
    ("J. R. R. Tolkien wrote it. Then?", ["J. R. R. Tolkien wrote it. ", "Then?"]),
    (
        "Meet at 5 p.m. or later, e.g. at six. Bye.",
        ["Meet at 5 p.m. or later, e.g. at six. ", "Bye."],
    ),
    (
        "See example.com, version 1.2.3 of it. Good.",
        ["See example.com, version 1.2.3 of it. ", "Good."],
    ),
    ("1. Wash the rice. 2. Cook it.", ["1. Wash the rice. ", "2. Cook it."]),
    ("“Why?” she asked. (It rained.) He ran.", ["“Why?” she asked. ", "(It rained.) ", "He ran."]),
    ("你好。世界！「真的吗？」他说。", ["你好。", "世界！", "「真的吗？」", "他说。"]),
    ("你好！ 再见。Bye. Ok", ["你好！ ", "再见。", "Bye. ", "Ok"]),
    ("Да. Нет?", ["Да. ", "Нет?"]),
    ("A title\n\nA text that\nwraps. End.\n", ["A title ", "A text that wraps. ", "End. "]),
    ("(A young woman. Soft.)Hello. Bye.", ["(A young woman. Soft.)Hello. ", "Bye."]),
    ("Hm. . . . Yes.", ["Hm. . . . ", "Yes."]),
    ("是。…. Next.", ["是。…. ", "Next."]),
    ("好。.NET 呢？", ["好。", ".NET 呢？"]),
    ("", []),
    (" \n\t ", []),
]


@pytest.mark.parametrize(("text", "pieces"), SPLITS)
def test_sentences_end_where_a_reader_would_end_them(text: str, pieces: list[str]) -> None:
    assert split_sentences(text) == pieces


def test_long_sentences_are_split_after_a_clause_else_a_word_else_anywhere() -> None:
    assert split_sentences("one two three, four five six", 20) == [
        "one two three, ",
        "four five six",
    ]
    assert split_sentences("one two three four five six", 20) == ["one two three four ", "five six"]
    assert split_sentences("一二三四五，六七八九十", 8) == ["一二三四五，", "六七八九十"]
    assert split_sentences("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]


@given(
    st.text(st.sampled_from("aB9.!?,;。！，…\"')」( \n\t") | st.characters(), max_size=200),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_text_and_short_enough(text: str, max_chars: int) -> None:
    pieces = split_sentences(text, max_chars)
    assert "".join(pieces) == clean_text(text).lstrip()
    assert all(piece.strip() for piece in pieces)
    assert all(len(piece.rstrip()) <= max_chars for piece in pieces)


HOSTILE = [".", "…", "?!", "a. ", "(", "()", ") ", "（", "。", "。…", '"', '."', ".)", "»", " \n"]
HOSTILE += [
    ", ",
    "Mr.",
    "\n ",
    "\n\t",
    " ",
    "\u3000",
    "a",
    "1",
    "1.",
    "１。",
    "؟",
    ",",
    "—",
    "\r\n",
]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("before", ["", "a", ".", "(", "\n", "。"])
def test_a_hostile_text_takes_linear_time(before: str, unit: str) -> None:
    times = unit * (50_000 // len(unit))
    start = time.process_time()
    for end in ("", "a", ".", "\n", ")"):
        split_sentences(before + times + end)
        split_voice_design(before + times + end)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "design", "rest"),
    [
        ("(A gentle voice) Hello", "(A gentle voice) ", "Hello"),
        ("（温柔）你好", "（温柔）", "你好"),
        ("Hello (there)", "", "Hello (there)"),
        ("(only this)", "", "(only this)"),
        ("(open", "", "(open"),
    ],
)
def test_the_description_of_a_voice_is_split_off(text: str, design: str, rest: str) -> None:
    assert split_voice_design(text) == (design, rest)
