"""Outputs that have the form they are asked for, whatever the model would rather say.

    python examples/structured_output.py [MODEL]

The bundled model tells tales and knows no JSON; the grammar sees to it that it is right all the
same.
"""

import json
import sys

from nanovllm import LLM, SamplingParams, StructuredOutputsParams

ANIMAL = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["wolf", "fox", "raven"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "speaks": {"type": "boolean"},
    },
    "required": ["kind", "legs", "speaks"],
    "additionalProperties": False,
}
FORMS = {
    "Describe an animal of the forest.": StructuredOutputsParams(json=ANIMAL),
    "Was it a good day?": StructuredOutputsParams(choice=["yes", "no"]),
    "When shall we meet?": StructuredOutputsParams(regex="[01][0-9]:[0-5][0-9]"),
}


def main(model: str | None) -> None:
    """Ask for several forms in one batch."""
    with LLM(model, max_model_len=2048) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in FORMS],
            [SamplingParams(max_tokens=100, structured_outputs=form) for form in FORMS.values()],
            use_tqdm=False,
        )
    for question, output in zip(FORMS, outputs, strict=True):
        sys.stdout.write(f"{question} {output['text']}\n")
    animal = json.loads(outputs[0].outputs[0].text)
    sys.stdout.write(f"The {animal['kind']} has {animal['legs']} legs.\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
