"""lm-eval says of our server what it says of transformers, on one tiny checkpoint in float32.

Its HTTP model scores texts through `/v1/completions` with `echo` and `logprobs`.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import make_checkpoint
from tests.environments import environment
from tests.serving import Server, serve

pytestmark = pytest.mark.accept

WINDOW = 96
"""Tokens that a model is shown at most, so that long texts are scored in several windows."""
NUM_DOCS = 12
MODEL = "tiny"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": [".", " a"], "do_sample": False, "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
WORDS = "a the king queen wolf hen wood was went to saw and said old little gold never home"


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose tokenizer knows the words of our documents.

    It has no bytes beyond ASCII: of half a character at the end of a text transformers makes
    U+FFFD, and we, as vLLM does, nothing.
    """
    directory = tmp_path_factory.mktemp("lm_eval") / "checkpoint"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|end|>"],
        initial_alphabet=[chr(code) for code in range(0x21, 0x7F)],
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 10, trainer)
    make_checkpoint(
        directory, "Qwen3", head_dim=32, vocab_size=bpe.get_vocab_size(), eos_token_id=0
    )
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks, which are YAML, as JSON is, and their documents."""
    directory = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)

    def sentence(num_words: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=num_words))

    documents = [
        {
            "question": sentence(rng.randint(1, 30)),
            "options": [f" {sentence(rng.randint(1, 4))}" for _ in range(4)],
            "label": rng.randrange(4),
            "text": sentence(rng.randint(1, 150)).capitalize() + "!",
        }
        for _ in range(NUM_DOCS)
    ]
    data = directory / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        whole = {"task": name, **source, "test_split": "test", **task}
        (directory / f"{name}.yaml").write_text(json.dumps(whole))
    return directory


@pytest.fixture(scope="module")
def server(checkpoint_dir: Path) -> Iterator[Server]:
    with serve(checkpoint_dir, dtype="float32", served_model_name=MODEL) as running:
        yield running


class Evaluation:
    """What a run of lm-eval found: a number for each metric of a task, and what each document got.

    Args:
        tasks: Where the tasks are.
        output: An empty directory.
        model: Kind of model.
        model_args: Its options.
        names: Of the tasks.
        options: More options of the command.
    """

    def __init__(
        self,
        tasks: Path,
        output: Path,
        model: str,
        model_args: dict[str, Any],
        names: tuple[str, ...] = tuple(TASKS),
        options: tuple[str, ...] = (),
    ) -> None:
        environment("lm_eval", over_ours=True).run(
            [
                *("-m", "lm_eval", "--model", model, "--tasks", ",".join(names)),
                *("--model_args", ",".join(f"{key}={value}" for key, value in model_args.items())),
                *("--include_path", str(tasks), "--output_path", str(output)),
                *("--log_samples", *options),
            ],
            OFFLINE | {"HF_HOME": str(tasks / "cache")},
        )
        (results,) = output.rglob("results_*.json")
        self.metrics = {
            task: {name: value for name, value in metrics.items() if isinstance(value, float)}
            for task, metrics in json.loads(results.read_text())["results"].items()
        }
        self.responses = {name: self._responses(output, name) for name in names}

    @staticmethod
    def _responses(output: Path, task: str) -> list[list[Any]]:
        """What the model said, flat, document by document."""
        (samples,) = output.rglob(f"samples_{task}_*.jsonl")
        documents = [json.loads(line) for line in samples.read_text().splitlines()]
        documents.sort(key=lambda document: document["doc_id"])
        return [list(_flat(document["filtered_resps"])) for document in documents]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


@pytest.fixture(scope="module")
def oracle(
    checkpoint_dir: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    """What transformers says."""
    return Evaluation(
        tasks,
        tmp_path_factory.mktemp("oracle"),
        "hf",
        {"pretrained": checkpoint_dir, "dtype": "float32", "max_length": WINDOW},
        options=("--device", "cpu", "--batch_size", "1"),
    )


@pytest.mark.parametrize(
    ("batch_size", "model_args"),
    [
        (1, {"num_concurrent": 4, "tokenizer_backend": "huggingface"}),
        (4, {"num_concurrent": 1, "tokenizer_backend": "huggingface"}),
        # The tokenizer is then the server's own, by /tokenizer_info, /tokenize and /detokenize.
        (1, {"num_concurrent": 2, "tokenizer_backend": "auto"}),
    ],
)
def test_scores_are_those_of_transformers(
    batch_size: int,
    model_args: dict[str, Any],
    server: Server,
    checkpoint_dir: Path,
    tasks: Path,
    tmp_path: Path,
    oracle: Evaluation,
) -> None:
    if model_args["tokenizer_backend"] == "huggingface":
        model_args = model_args | {"tokenizer": checkpoint_dir}
    ours = Evaluation(
        tasks,
        tmp_path,
        "local-completions",
        {
            "model": MODEL,
            "base_url": f"{server.url}/v1/completions",
            # It keeps one token for what has to be generated, and one of the window for the past.
            "max_length": WINDOW + 2,
            **model_args,
        },
        options=("--batch_size", str(batch_size)),
    )
    assert ours.metrics.keys() == oracle.metrics.keys()
    for task, expected in oracle.metrics.items():
        assert ours.metrics[task] == pytest.approx(expected, rel=1e-4), task
    for name in ("acc,none", "acc_norm,none"):
        assert ours.metrics["choices"][name] == oracle.metrics["choices"][name]
    for task in TASKS:
        assert len(ours.responses[task]) == len(oracle.responses[task]) == NUM_DOCS
        for got, expected_of_doc in zip(ours.responses[task], oracle.responses[task], strict=True):
            assert_same(got, expected_of_doc)


def assert_same(got: list[Any], expected: list[Any]) -> None:
    """Texts and "is it the greedy choice" are equal, log-likelihoods within 1e-4 relative."""
    assert len(got) == len(expected)
    for value, other in zip(got, expected, strict=True):
        if _is_number(other):
            assert float(value) == pytest.approx(float(other), rel=1e-4)
        else:
            assert value == other


def _is_number(value: Any) -> bool:
    """Whether it is one; samples have numbers as text."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def test_chat_writes_what_transformers_writes(
    server: Server, checkpoint_dir: Path, tasks: Path, tmp_path: Path
) -> None:
    theirs = Evaluation(
        tasks,
        tmp_path / "theirs",
        "hf",
        {"pretrained": checkpoint_dir, "dtype": "float32"},
        names=("writing",),
        options=("--device", "cpu", "--batch_size", "1", "--apply_chat_template"),
    )
    ours = Evaluation(
        tasks,
        tmp_path / "ours",
        "local-chat-completions",
        {"model": MODEL, "base_url": f"{server.url}/v1/chat/completions", "num_concurrent": 3},
        names=("writing",),
        options=("--apply_chat_template",),
    )
    assert ours.responses == theirs.responses
    assert any(text for (text,) in ours.responses["writing"])
