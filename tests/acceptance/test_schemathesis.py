"""schemathesis holds every answer against the API's own description, `/openapi.json`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.environments import CLIENTS, environment
from tests.serving import serve

pytestmark = pytest.mark.accept

NUM_CASES = 2000
SEED = 1
KEY = "sk-test"


@pytest.mark.parametrize(
    ("keys", "speaks"), [([], False), ([KEY], True)], ids=["open", "with a key, and speech"]
)
def test_the_description_holds(
    keys: list[str], speaks: bool, tmp_path: Path, speech_checkpoint: Callable[..., Path]
) -> None:
    """No 5xx, no answer that is not described, nothing refused that is described as right.

    A short context keeps the answers short where a request sets no limit.
    """
    report = tmp_path / "report.json"
    speech: dict[str, Any] = {
        "speech_model": str(speech_checkpoint("v2")),
        "speech_max_model_len": 128,
    }
    with serve(api_key=keys, max_model_len=128, **speech if speaks else {}) as server:
        output = environment("schemathesis").run(
            [
                *("-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
                *("--max-examples", "60", "--seed", str(SEED), "--generation-database", "none"),
                *("--request-timeout", "60", "--max-response-time", "60"),
                *("--continue-on-failure", "--report-json-path", str(report)),
                *(f"--header=Authorization: Bearer {key}" for key in keys),
            ],
            {"SCHEMATHESIS_HOOKS": "schemathesis_checks", "PYTHONPATH": str(CLIENTS)},
            statuses=(0, 1),
        )
        summary = json.loads(report.read_text())
        assert summary["exit_code"] == 0, output
        assert summary["complete"]
        assert not summary["errors"]
        assert summary["operations"]["tested"] == summary["operations"]["total"] >= 15
        assert summary["test_cases"]["generated"] >= NUM_CASES
        assert server.get("/ready")[0] == 200
