"""`/v1/decisions` and `/v1/systemone`: what the model is asked, the answers, and refusals."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.fake_llm import FakeLLM, share_of
from tests.server_client import build, post, refused

OPENAI, SYSTEM_ONE = "/v1/decisions", "/v1/systemone"
PREDICATE = {"type": "predicate", "instructions": "The wolf lies."}
CHOICE = {
    "type": "choice",
    "name": "who",
    "instructions": "Who is it?",
    "choices": [{"value": "wolf", "description": "grey"}, {"value": True}, {"value": "true"}],
}
SCORE = {
    "type": "score",
    "instructions": [{"type": "input_text", "text": "How old?"}],
    "levels": [{"label": "young"}, {"label": "old", "description": "very"}, {"label": "older"}],
}
NOUL = {"type": "noul", "instructions": "Does the wolf lie?"}


SEEN = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}


def asked_of(llm: FakeLLM, message: str) -> str:
    """The prompt that a conversation of one message is."""
    messages = [{"role": "user", "content": message}]
    kwargs = {"enable_thinking": False}
    return llm.frontend.render(messages, chat_template_kwargs=kwargs, add_generation_prompt=True)


def shares(llm: FakeLLM, *labels: str) -> list[float]:
    """What it makes of labels, among each other."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    before = tokenizer.encode("\n", False)
    found = []
    for label in labels:
        spellings = [tokenizer.encode(f"\n{space}{label}", False) for space in ("", " ")]
        found.append(sum(share_of(ids[-1]) for ids in spellings if ids[:-1] == before))
    return [share / sum(found) for share in found]


def test_answers_in_openai_s_form(client: TestClient, llm: FakeLLM) -> None:
    answer = post(client, OPENAI, input="A tale.", questions=[PREDICATE, CHOICE, SCORE])
    predicate, choice, score = answer["answers"]
    yes, _ = shares(llm, "yes", "no")
    assert predicate == {"type": "predicate", "name": None, "probability": pytest.approx(yes)}
    values, of_values = ["wolf", True, "true"], shares(llm, "A", "B", "C")
    assert [item["value"] for item in choice["probabilities"]] == values
    assert [item["probability"] for item in choice["probabilities"]] == pytest.approx(of_values)
    assert choice["choice"] is values[of_values.index(max(of_values))]
    assert (choice["type"], choice["name"]) == ("choice", "who")
    of_levels = shares(llm, "0", "1", "2")
    assert score["score"] == pytest.approx(of_levels[1] + 2 * of_levels[2])
    assert [(i["value"], i["label"]) for i in score["probabilities"]] == [
        *((0, "young"), (1, "old"), (2, "older"))
    ]
    assert 0 < score["confidence"] <= 1
    texts = [item.prompt for item, _, _ in llm.submitted]
    assert texts[0] == asked_of(
        llm,
        "A tale.\n\nThe wolf lies.\nyes\nno\nReply with yes or no, and with nothing else.",
    )
    assert "Who is it?\nA: wolf - grey\nB: true\nC: true\nReply" in str(texts[1])
    assert "How old?\n0: young\n1: old - very\n2: older\nReply" in str(texts[2])
    num_tokens = sum(len(item.token_ids) for item, _, _ in llm.submitted)
    assert answer["usage"] == {
        "input_tokens": num_tokens,
        "input_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_tokens + 3,
    }
    assert llm.num_open == 0
    assert answer["model"] == "demo_model"


def test_answers_in_system_one_s_form(client: TestClient, llm: FakeLLM) -> None:
    questions: dict[str, Any] = {
        "lies": NOUL | {"criteria": {"true": "it does", "false": {"it": "tells the truth"}}},
        "who": {"type": "choice", "criteria": {"wolf": "grey", "child": None}},
        "age": {"type": "score", "instructions": {"how": "old"}, "criteria": ["young", "old"]},
    }
    answer = post(
        client, SYSTEM_ONE, state={"tale": "König"}, instructions="Be wise.", questions=questions
    )
    assert answer["object"] == "structured_decision"
    assert answer["id"].startswith("decision-")
    assert list(answer["answers"]) == list(answer["diagnostics"]) == list(questions)
    yes, no = shares(llm, "yes", "no")
    lies, who, age = answer["answers"].values()
    assert lies["noul"] == pytest.approx(yes)
    assert lies["probabilities"] == pytest.approx({"yes": yes, "no": no})
    wolf, child = shares(llm, "A", "B")
    assert who["probabilities"] == pytest.approx({"wolf": wolf, "child": child})
    assert who["choice"] == ("wolf" if wolf > child else "child")
    assert age["legend"] == {"0": "young", "1": "old"}
    assert age["score"] == pytest.approx(shares(llm, "0", "1")[1])
    for each, diagnostics in zip(
        answer["answers"].values(), answer["diagnostics"].values(), strict=True
    ):
        best = max(each["probabilities"].values())
        assert each["confidence"] == pytest.approx(best * diagnostics["label_mass"])
        assert diagnostics["argmax_is_label"] is False
    texts = [str(item.prompt) for item, _, _ in llm.submitted]
    assert all('{"tale": "König"}\n\nBe wise.\n\n' in text for text in texts)
    assert 'Does the wolf lie?\nyes: it does\nno: {"it": "tells the truth"}\nReply' in texts[0]
    assert "Be wise.\n\nA: wolf - grey\nB: child\nReply" in texts[1]
    assert '{"how": "old"}\n0: young\n1: old\nReply' in texts[2]
    assert answer["usage"]["output_tokens"] == 3


def test_a_conversation_ends_in_the_question(client: TestClient, llm: FakeLLM) -> None:
    said = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": ["ß"]}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I see."}]},
    ]
    post(client, OPENAI, input=said, questions=[PREDICATE])
    post(client, OPENAI, input=[*said, {"role": "user", "content": "So?"}], questions=[PREDICATE])
    first, second = (str(item.prompt) for item, _, _ in llm.submitted)
    assert '{"a": ["ß"]}' in first
    assert first.index("Be kind.") < first.index("I see.") < first.index("The wolf lies.")
    assert "So?\n\nThe wolf lies." in second
    assert "So?" not in first


def test_the_template_is_asked_for_no_thoughts(llm: FakeLLM) -> None:
    assert llm.tokenizer is not None
    llm.tokenizer.chat_templates["default"] = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "<|im_start|>{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    )
    client = TestClient(build(llm))
    post(client, OPENAI, input="x", questions=[PREDICATE])
    assert str(llm.submitted[0][0].prompt).endswith("</think>\n\n")
    thinks = {"enable_thinking": True}
    error = refused(client, OPENAI, input="x", questions=[PREDICATE], chat_template_kwargs=thinks)
    assert "thinks before it answers" in error["message"]
    assert len(llm.submitted) == 1


def test_many_questions_do_not_fill_the_queue(client: TestClient, llm: FakeLLM) -> None:
    llm.config = replace(llm.config, max_num_seqs=3)
    answer = post(client, OPENAI, input="x", questions=[PREDICATE] * 20)
    assert len(answer["answers"]) == 20
    assert llm.most_open == 3


def test_what_else_a_request_may_say(client: TestClient, llm: FakeLLM) -> None:
    body = {"input": "x", "questions": [PREDICATE], "priority": 3, "cache_salt": "s", "odd": 1}
    response = client.post(OPENAI, json=body, headers={"X-Request-Id": "my-id"})
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == "my-id"
    ((item, priority, salt),) = llm.submitted
    assert (priority, salt) == (3, "s")
    params = item.params
    assert (params.max_tokens, params.temperature, len(params.logprob_token_ids or [])) == (1, 0, 2)
    named = {"state": "x", "questions": {"q": NOUL}, "request_id": "other"}
    assert post(client, SYSTEM_ONE, **named)["id"] == "decision-other"


def test_a_request_is_ended(client: TestClient, llm: FakeLLM) -> None:
    llm.config, llm.delay = replace(llm.config, max_num_seqs=2), 0.1
    body = {"state": "x", "questions": {str(i): NOUL for i in range(40)}, "request_id": "long"}
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(client.post, SYSTEM_ONE, json=body)
        while not llm.submitted:
            time.sleep(0.01)
        ended = post(client, "/abort", request_id="decision-long")
    assert ended["aborted"] is True
    assert answer.result().status_code == 400
    assert "ended before it was done" in answer.result().text
    assert len(llm.submitted) < 40
    assert llm.num_open == 0
    assert post(client, "/abort", request_id="decision-long")["aborted"] is False


def test_the_model_may_be_left_empty(client: TestClient) -> None:
    empty: dict[str, Any] = {"model": "", "images": [], "audio": None}
    assert post(client, SYSTEM_ONE, state=None, questions={"q": NOUL}, **empty)["answers"]
    assert post(client, OPENAI, input="x", questions=[PREDICATE], model="")["answers"]


def changed(question: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {"input": "x", "questions": [{**question, **changes}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"questions": [PREDICATE]}, "input"),
        ({"input": "", "questions": [PREDICATE]}, "input"),
        ({"input": [], "questions": [PREDICATE]}, "input"),
        ({"input": [{"type": "reasoning"}], "questions": [PREDICATE]}, "input"),
        ({"input": "x"}, "questions"),
        ({"input": "x", "questions": []}, "questions"),
        ({"input": "x", "questions": [PREDICATE] * 401}, "questions"),
        ({"input": "a king " * 300, "questions": [PREDICATE]}, "input"),
        (changed(PREDICATE, type="guess"), "questions.0"),
        (changed(PREDICATE, instructions=None), "questions.0"),
        (changed(CHOICE, choices=[{"value": "a"}]), "questions.0"),
        (changed(CHOICE, choices=[{"value": "a"}, {"value": "a"}]), "questions.0"),
        (changed(CHOICE, choices=[{"value": 1}, {"value": 2}]), "questions.0"),
        (changed(CHOICE, choices=[{"value": str(i)} for i in range(256)]), "questions.0"),
        (changed(CHOICE, choices=[{"value": str(i)} for i in range(255)]), "questions.0"),
        (changed(SCORE, levels=[{"label": "one"}]), "questions.0"),
        (changed(SCORE, levels=[{"label": "one"}] * 11), "questions.0"),
        ({"input": [SEEN], "questions": [PREDICATE]}, "input.0"),
        ({"input": "x", "questions": [PREDICATE], "chat_template_kwargs": {"messages": 1}}, "chat"),
    ],
)
def test_what_is_refused(
    client: TestClient, llm: FakeLLM, body: dict[str, Any], param: str
) -> None:
    error = refused(client, OPENAI, **body)
    assert str(error["param"]).startswith(param), error
    assert not llm.submitted


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"state": ...}, "state"),
        ({"questions": {}}, "questions"),
        ({"questions": {"": NOUL}}, "questions"),
        ({"questions": {"q": {"type": "essay"}}}, "questions.q"),
        ({"questions": {"q": NOUL | {"criteria": ["a"]}}}, "questions.q"),
        ({"questions": {"q": {"type": "choice"}}}, "questions.q"),
        ({"questions": {"q": NOUL | {"critera": None}}}, "questions.q"),
        ({"questions": {"q": NOUL | {"criteria": {"yes": "a"}}}}, "questions.q"),
        ({"questions": {"q": {"type": "choice", "criteria": {}}}}, "questions.q"),
        ({"questions": {"q": {"type": "score", "criteria": ["one"]}}}, "questions.q"),
        ({"images": ["data:image/png;base64,AA=="]}, "images"),
    ],
)
def test_what_system_one_refuses(
    client: TestClient, llm: FakeLLM, changes: dict[str, Any], param: str
) -> None:
    body = {"state": "x", "questions": {"q": NOUL}} | changes
    given = {name: value for name, value in body.items() if value is not ...}
    error = refused(client, SYSTEM_ONE, **given)
    assert str(error["param"]).startswith(param), error
    assert not llm.submitted


def test_a_model_without_a_template_decides_nothing(llm: FakeLLM) -> None:
    assert llm.tokenizer is not None
    llm.tokenizer.chat_templates.clear()
    error = refused(TestClient(build(llm)), OPENAI, input="x", questions=[PREDICATE])
    assert "chat template" in error["message"]


def test_labels_are_read_where_the_prompt_ends(llm: FakeLLM, client: TestClient) -> None:
    """Whatever is asked before it."""
    post(client, OPENAI, input="x" * 100, questions=[CHOICE])
    ((item, _, _),) = llm.submitted
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(f"{item.prompt}A", False)
    assert ids[:-1] == item.token_ids
    assert ids[-1] in (item.params.logprob_token_ids or [])
