import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanovllm.bench.serve_config import Load
from nanovllm.bench.speech import SpeechRecord, run_speech, summarize
from nanovllm.bench.speech_config import SpeechBenchConfig
from nanovllm.bench.speech_shapes import RELEASES, write_release
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.model import VoxCPM
from nanovllm.models.weights import expected_tensors


def test_real_time_factors_count_from_the_request_and_from_the_first_sound() -> None:
    record = SpeechRecord(10.0, [(11.0, 8000), (11.5, 8000), (12.5, 16000)], ended=12.5)
    result = summarize([record], Load(concurrency=1), sample_rate=16000)
    assert result.audio_seconds == 2.0
    assert result.duration == 2.5
    assert result.audio_rate == pytest.approx(0.8)
    assert result.rtf is not None
    assert result.rtf.p50 == pytest.approx(2.5 / 2)
    assert result.rtf_after_first is not None
    assert result.rtf_after_first.p50 == pytest.approx(1.5 / 2)
    assert result.ttfb is not None
    assert result.ttfb.p50 == pytest.approx(1.0)
    assert result.gap is not None
    assert result.gap.max == pytest.approx(1.0)


def test_failures_are_counted_and_told() -> None:
    good = SpeechRecord(0.0, [(1.0, 100)], ended=1.0)
    bad = SpeechRecord(0.0, ended=3.0, error="the engine died")
    result = summarize([good, bad], Load(), sample_rate=100)
    assert (result.num_requests, result.num_completed) == (2, 1)
    assert result.first_error == "the engine died"
    assert result.audio_seconds == 1.0


def test_loads_are_closed_loops_unless_a_rate_is_given() -> None:
    assert SpeechBenchConfig().loads() == [Load(concurrency=1), Load(concurrency=8)]
    assert SpeechBenchConfig(concurrency=[4]).loads() == [Load(concurrency=4)]
    assert SpeechBenchConfig(request_rate=2.0).loads() == [Load(request_rate=2.0)]


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": [1], "request_rate": 1.0},
        {"concurrency": [0]},
        {"request_rate": 0.0},
        {"inference_timesteps": 1},
        {"audio_seconds": 0.0},
        {"audio_seconds": float("inf")},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        SpeechBenchConfig(**options)  # type: ignore[arg-type]


def test_an_unknown_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"0\.5b, 1\.5, 2"):
        write_release(tmp_path, "3")


def test_a_release_without_dummy_weights_is_refused() -> None:
    config = SpeechBenchConfig(release="0.5b")
    with pytest.raises(InvalidRequestError, match="dummy_weights"):
        asyncio.run(run_speech(config, EngineConfig()))


@pytest.mark.parametrize(
    ("release", "millions"),
    [
        ("0.5b", [433.9, 89.7, 59.8, 64.2, 652.3]),
        ("1.5", [433.9, 119.6, 119.6, 124.0, 801.7]),
        ("2", [1471.7, 377.5, 207.7, 212.0, 2290.0]),
    ],
)
def test_releases_have_the_published_sizes(release: str, millions: list[float]) -> None:
    with torch.device("meta"):
        model = VoxCPM(VoxCPMConfig.from_dict(RELEASES[release]))
    sizes: Counter[str] = Counter()
    for name, shape in expected_tensors(model).items():
        sizes[name.split(".")[0]] += math.prod(shape)
    parts = [sizes[f] for f in ("base_lm", "residual_lm", "feat_encoder", "feat_decoder")]
    assert [round(n / 1e6, 1) for n in [*parts, sizes.total()]] == millions


def test_a_model_is_measured(speech_checkpoint: Callable[..., Path]) -> None:
    config = SpeechBenchConfig(
        concurrency=[1, 3], num_requests=3, audio_seconds=0.5, prompt_seconds=0.5, num_warmups=1
    )
    engine = EngineConfig(model=str(speech_checkpoint("v1")), device="cpu", num_kv_blocks=64)
    result = asyncio.run(run_speech(config, engine))
    assert [str(load.load) for load in result.loads] == ["1 at a time", "3 at a time"]
    for load in result.loads:
        assert (load.num_requests, load.num_completed, load.first_error) == (3, 3, None)
        assert load.audio_seconds == pytest.approx(3 * 7 * 0.08)  # whole patches
    assert json.loads(json.dumps(result.to_dict()))["settings"]["patches"] == 7


def test_a_model_there_must_be() -> None:
    with pytest.raises(InvalidRequestError, match="no model: give --model, or --release"):
        asyncio.run(run_speech(SpeechBenchConfig(), EngineConfig()))


def test_more_speech_than_the_context_holds(speech_checkpoint: Callable[..., Path]) -> None:
    config = SpeechBenchConfig(concurrency=[1], audio_seconds=1000)
    engine = EngineConfig(model=str(speech_checkpoint("v1")), device="cpu", num_kv_blocks=64)
    with pytest.raises(InvalidRequestError, match="audio_seconds=1000 are 12500 patches") as caught:
        asyncio.run(run_speech(config, engine))
    assert caught.value.param == "audio_seconds"


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_a_directory_of_config_and_tokenizer(tmp_path: Path, release: str) -> None:
    directory = write_release(tmp_path, release)
    assert json.loads((directory / "config.json").read_text()) == RELEASES[release]
    assert (directory / "tokenizer.json").is_file()
