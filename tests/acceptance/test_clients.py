"""litellm and langchain-openai on a live server; `clients/use_*.py` is what their users do."""

import pytest

from tests.environments import CLIENTS, environment
from tests.serving import serve

pytestmark = pytest.mark.accept

MODEL, KEY = "org/tale-1B", "sk-test"
OPTIONS = {"served_model_name": MODEL, "dtype": "float32"}
"""bfloat16 rounds by the size of the batch; they compare texts."""


def test_litellm() -> None:
    with serve(**OPTIONS) as server:
        environment("litellm").run(
            (CLIENTS / "use_litellm.py", server.url, MODEL),
            {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the network for one
        )


def test_langchain() -> None:
    with serve(**OPTIONS, api_key=KEY) as server:
        environment("langchain").run((CLIENTS / "use_langchain.py", server.url, MODEL, KEY))
