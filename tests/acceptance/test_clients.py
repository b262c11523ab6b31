"""litellm, langchain and instructor on a live server; `clients/use_*.py` is what their users do."""

import pytest

from tests.environments import CLIENTS, environment
from tests.scripted_llm import ScriptedLLM, serve_scripted
from tests.serving import serve

pytestmark = pytest.mark.accept

MODEL, KEY = "org/tale-1B", "sk-test"
OPTIONS = {"served_model_name": MODEL, "dtype": "float32"}
"""bfloat16 rounds by the size of the batch; they compare texts."""
CALLS = """I know of two cities.
<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>"""


def test_litellm() -> None:
    with serve(**OPTIONS) as server:
        environment("litellm").run(
            (CLIENTS / "use_litellm.py", server.url, MODEL),
            {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the network for one
        )


def test_langchain() -> None:
    with serve(**OPTIONS, api_key=KEY) as server:
        environment("langchain").run((CLIENTS / "use_langchain.py", server.url, MODEL, KEY))


def test_agents_of_langchain() -> None:
    """The model calls two tools of its own accord, and then answers."""

    def script(prompt: str) -> str:
        assert "You know the weather." in prompt
        assert '"name": "weather"' in prompt
        if "<tool_response>\n21 degrees" not in prompt:
            return CALLS
        assert "<tool_response>\n9 degrees" in prompt
        return "It is warmer in Paris."

    with serve_scripted(ScriptedLLM(script), api_key=[KEY]) as url:
        environment("langchain").run((CLIENTS / "use_langchain_agent.py", url, KEY))


def test_instructor() -> None:
    with serve(**OPTIONS, api_key=KEY) as server:
        environment("instructor").run((CLIENTS / "use_instructor.py", server.url, MODEL, KEY))
