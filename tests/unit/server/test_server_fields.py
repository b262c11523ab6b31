"""What counts as an integer, or as false, in a request, and how the description puts it."""

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.server_client import CHAT, HI, TEXT, post, refused


class TestWholeNumbers:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_tokens", 2.0),
            ("n", 1.0),
            ("top_k", -1.0),
            ("seed", 1e15),
            ("logprobs", 2.0),
            ("truncate_prompt_tokens", -1.0),
            ("stop_token_ids", [5, 6.0]),
            ("allowed_token_ids", [7.0]),
            ("prompt", [3.0, 4]),
            ("prompt", [[3, 4.0], "a"]),
        ],
    )
    def test_may_be_written_with_a_fraction_of_zero(
        self, client: TestClient, field: str, value: Any
    ) -> None:
        assert post(client, TEXT, **{"prompt": "a", field: value})["choices"]

    def test_are_counted_as_integers(self, client: TestClient) -> None:
        assert client.post("/detokenize", json={"tokens": [72.0, 105]}).json() == (
            client.post("/detokenize", json={"tokens": [72, 105]}).json()
        )

    @pytest.mark.parametrize("value", [2.5, "2", True, [2]])
    @pytest.mark.parametrize("field", ["max_tokens", "n", "seed"])
    def test_nothing_else_is_one(self, client: TestClient, field: str, value: Any) -> None:
        assert refused(client, CHAT, messages=HI, **{field: value})["param"] == field

    @pytest.mark.parametrize("value", [0, -2])
    def test_a_prompt_is_cut_to_something(self, client: TestClient, value: int) -> None:
        error = refused(client, TEXT, prompt="a", truncate_prompt_tokens=value)
        assert error["message"] == "truncate_prompt_tokens: must be at least 1, or -1"


def test_zero_is_not_false(client: TestClient) -> None:
    assert post(client, CHAT, messages=HI, use_beam_search=False)["choices"]
    for value in (0, 0.0, "", True):
        error = refused(client, CHAT, messages=HI, use_beam_search=value)
        assert error["param"] == "use_beam_search"


def test_the_description_has_exact_bounds(app: FastAPI) -> None:
    fields = app.openapi()["components"]["schemas"]["CompletionRequest"]["properties"]
    bounds = fields["seed"]["anyOf"][0]
    assert bounds == {"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**63}
    assert {type(bounds["minimum"]), type(bounds["exclusiveMaximum"])} == {int}
    assert fields["temperature"]["anyOf"][0]["minimum"] == 0
