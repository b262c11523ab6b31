"""Decisions of a live server against transformers' probabilities of the labels."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm.config import DEMO_MODEL, EngineConfig
from nanovllm.text.frontend import TextFrontend
from tests.serving import Server

ABOUT = "A wolf met a child in the wood, and asked it where it went. " * 3
ASKED = {
    "old": ("How old is it?", ["young", "grown", "old"], ["0", "1", "2"], "score"),
    "who": ("Who asked?", ["the wolf", "the child"], ["A", "B"], "choice"),
    "true": ("Is it true?", ["", ""], ["yes", "no"], "noul"),
}


@torch.inference_mode()
def test_probabilities_are_transformers() -> None:
    questions = {
        name: {
            "type": kind,
            "instructions": text,
            "criteria": {
                "score": options,
                "choice": dict.fromkeys(options),
                "noul": None,
            }[kind],
        }
        for name, (text, options, _, kind) in ASKED.items()
    }
    with Server(dtype="float32") as server:
        status, answer = server.post("/v1/systemone", {"state": ABOUT, "questions": questions})
        again = server.post("/v1/systemone", {"state": ABOUT, "questions": questions})[1]
    assert status == 200, answer
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    frontend = TextFrontend(DEMO_MODEL, EngineConfig())
    for name, (text, options, labels, kind) in ASKED.items():
        lines = [
            f"{label}: {option}" if option else label
            for label, option in zip(labels, options, strict=True)
        ]
        request = {
            "score": "Reply with the number of the level that fits best, and with nothing else.",
            "choice": "Reply with the label of the answer that fits best, and with nothing else.",
            "noul": "Reply with yes or no, and with nothing else.",
        }[kind]
        message = "\n".join([f"{ABOUT}\n\n{text}", *lines, request])
        prompt = frontend.render(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            chat_template_kwargs={"enable_thinking": False},
        )
        ids = frontend.encode(prompt, add_special_tokens=False)
        probabilities = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        of_labels = [
            [
                longer[-1]
                for space in ("", " ")
                if len(longer := frontend.encode(prompt + space + label, False)) == len(ids) + 1
            ]
            for label in labels
        ]
        shares = [float(probabilities[token_ids].sum()) for token_ids in of_labels]
        expected, mass = [share / sum(shares) for share in shares], sum(shares)
        says_a_label = any(int(probabilities.argmax()) in token_ids for token_ids in of_labels)
        for told in (answer, again):
            found = list(told["answers"][name]["probabilities"].values())
            assert found == pytest.approx(expected, abs=1e-4)
            diagnostics = told["diagnostics"][name]
            assert diagnostics["label_mass"] == pytest.approx(mass, rel=1e-3)
            assert diagnostics["argmax_is_label"] is says_a_label
