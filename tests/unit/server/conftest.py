"""A server in this process, over a model that says what it is told to."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.fake_llm import FakeLLM
from tests.fake_speech import FakeSpeech
from tests.server_client import build, build_speech


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def speech() -> FakeSpeech:
    return FakeSpeech()


@pytest.fixture
def speaker(speech: FakeSpeech) -> TestClient:
    """A client of a server that speaks and does not write."""
    return TestClient(build_speech(speech))


@pytest.fixture
def app(llm: FakeLLM) -> FastAPI:
    return build(llm)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)
