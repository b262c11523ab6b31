"""What tests of whole engines share."""

import pytest

from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.worker import loading
from tests.capturable_attention import CapturableAttention
from tests.recorded_graphs import RecordedGraphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """Engines that are started now capture their graphs, in plain torch."""
    recorded = RecordedGraphs()
    monkeypatch.setattr(TorchKernels, "attention", lambda self, config: CapturableAttention(config))
    monkeypatch.setattr(
        loading,
        "graph_capture",
        lambda config, device: None if config.enforce_eager else recorded,
    )
    return recorded
