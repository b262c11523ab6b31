"""`nanovllm speak`: what is asked of the model, the file it writes, and what it says about it."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nanovllm.cli import main
from nanovllm.config import EngineConfig
from nanovllm.errors import EngineDeadError
from nanovllm.speech_params import SpeechParams
from tests.fake_speech import FakeSpeech

TEXT = "Good morning."


class SpokenTo(FakeSpeech):
    """A fake that a command builds, and that remembers what became of it."""

    made: "SpokenTo"

    @classmethod
    def from_config(cls, config: EngineConfig) -> "SpokenTo":
        cls.made = cls()
        cls.made.config = config
        return cls.made

    async def __aenter__(self) -> "SpokenTo":
        return self

    async def __aexit__(self, *error: object) -> None:
        self.is_ready = False


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nanovllm.async_speech.AsyncSpeech", SpokenTo)
    monkeypatch.chdir(tmp_path)


def speak(*arguments: str) -> SpokenTo:
    main(["speak", *arguments, "--model", "voxcpm"])
    assert not SpokenTo.made.is_ready
    return SpokenTo.made


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Run a command that must end with this status and one line; return that."""
    with pytest.raises(SystemExit) as caught:
        main(["speak", *arguments])
    assert caught.value.code == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("nanovllm: error: ").strip()


def recording(name: str) -> Path:
    path = Path(name)
    soundfile.write(path, np.full(16000, 0.1, np.float32), 16000)
    return path


def test_a_file_and_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    model = speak(TEXT, "-o", "out.wav")
    info = soundfile.info("out.wav")
    assert (info.samplerate, info.channels, info.frames) == (16000, 1, 5 * 1280)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("0.40 s of speech at 16000 Hz in ")
    assert "RTF" in shown.err
    assert [(text, params) for text, params, _ in model.asked] == [(TEXT, SpeechParams())]
    assert not model.config.enable_lora


@pytest.mark.parametrize(
    ("name", "kind"), [("a.FLAC", "FLAC"), ("a.mp3", "MP3"), ("a.ogg", "OGG"), ("a.opus", "OGG")]
)
def test_the_suffix_says_the_format(name: str, kind: str) -> None:
    speak(TEXT, "-o", name)
    assert soundfile.info(name).format == kind


def test_bare_samples_and_a_format_that_is_not_the_suffix() -> None:
    speak(TEXT, "-o", "a.raw")
    assert len(np.fromfile("a.raw", "<f4")) == 5 * 1280
    speak(TEXT, "-o", "a.dat", "--format", "pcm")
    assert len(np.fromfile("a.dat", "<i2")) == 5 * 1280


def test_standard_output_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    speak(TEXT, "-o", "-")
    assert written.getvalue().startswith(b"RIFF")
    assert len(written.getvalue()) == 44 + 2 * 5 * 1280


def test_how_it_is_spoken() -> None:
    flags = ["--cfg-value", "1", "--inference-timesteps", "4", "--temperature", "0.5"]
    flags += ["--min-len", "1", "--max-generate-length", "9", "--retry-badcase", "--seed", "5"]
    model = speak(TEXT, "-o", "out.wav", *flags)
    expected = SpeechParams(
        cfg_value=1.0,
        inference_timesteps=4,
        temperature=0.5,
        min_len=1,
        max_generate_length=9,
        retry_badcase=True,
    )
    assert model.asked[0][1] == expected
    assert model.config.seed == 5


def test_voices_and_an_adapter(tmp_path: Path) -> None:
    prompt, reference = recording("prompt.wav"), recording("reference.flac")
    (tmp_path / "lora").mkdir()
    files = ["--voice", str(prompt), "--voice-text", "Hello.", "--reference", str(reference)]
    model = speak(TEXT, "-o", "out.wav", *files, "--lora", "lora")
    assert [(kind, side) for _, kind, side in model.encoded] == [("wav", "left"), ("flac", "right")]
    options = model.asked[0][2]
    assert options["prompt_text"] == "Hello."
    assert options["prompt_latents"]
    assert options["ref_audio_latents"]
    assert model.loras == {options["lora_name"]: str(tmp_path / "lora")}
    assert model.config.enable_lora


def test_a_long_text_sentence_by_sentence_from_a_file() -> None:
    Path("text.txt").write_text("One is here. Two is there.\n")
    model = speak("--file", "text.txt", "-o", "out.wav", "--split-sentences")
    assert [text for text, *_ in model.asked] == ["One is here. ", "Two is there."]
    assert "prompt_latents" in model.asked[1][2]
    assert soundfile.info("out.wav").frames == 2 * 5 * 1280


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT, "-o", "out.wav"], "no model: give --model"),
        ([TEXT, "-o", "out.doc", "--model", "m"], "cannot tell the format of 'out.doc'"),
        ([TEXT, "-o", "out", "--model", "m"], "cannot tell the format of 'out'"),
        (
            [TEXT, "-o", "no/out.wav", "--model", "m"],
            "cannot write no/out.wav: there is no directory no",
        ),
        ([TEXT, "-o", "x.wav", "--model", "m", "--voice", "v.wav"], "--voice and --voice-text go"),
        ([TEXT, "-o", "x.wav", "--model", "m", "--voice-text", "v"], "--voice and --voice-text go"),
        ([TEXT, "-o", "x.wav", "--model", "m", "--reference", "no.wav"], "no.wav: No such file"),
        (
            [TEXT, "-o", "x.wav", "--model", "m", "--cfg-value", "11"],
            "cfg_value must be in",
        ),
        (["", "-o", "x.wav", "--model", "m"], "target text must be a non-empty string"),
        ([TEXT, "--model", "m"], "--output"),
        (
            [TEXT, "-o", "x.wav", "--model", "m", "--retry-badcase", "--split-sentences"],
            "do not go together",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in fails(capsys, 2, *arguments)
    assert not Path("x.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "-o", "x.wav"], "target text must be a non-empty string"),
        ([TEXT, "-o", "x.wav", "--voice", "no.wav", "--voice-text", "a"], "no.wav: No such file"),
        ([TEXT, "-o", "x.wav", "--voice", "no.wav", "--voice-text", " "], "--voice-text is blank"),
        ([TEXT, "-o", "x.wav", "--reference", "no.wav"], "no.wav: No such file"),
        ([TEXT, "-o", "locked/x.wav"], "cannot write locked/x.wav: permission denied"),
        ([TEXT, "-o", "locked.wav"], "cannot write locked.wav: permission denied"),
    ],
)
def test_what_shows_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    Path("locked").mkdir()
    Path("locked.wav").touch()
    # Whoever is root may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    monkeypatch.setattr(SpokenTo, "from_config", None)
    assert message in fails(capsys, 2, *arguments, "--model", "m")


def test_a_recording_that_is_none_and_an_engine_that_dies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("v.wav").write_bytes(b"not a recording")
    voice = ["--voice", "v.wav", "--voice-text", "x"]
    assert "formats" in fails(capsys, 2, TEXT, "-o", "x.wav", "--model", "m", *voice)

    class Dying(SpokenTo):
        async def generate(self, *args: Any, **options: Any) -> Any:
            raise EngineDeadError("the engine died while it worked on this; try again")

    monkeypatch.setattr("nanovllm.async_speech.AsyncSpeech", Dying)
    assert "engine died" in fails(capsys, 1, TEXT, "-o", "x.wav", "--model", "m")
    assert not Path("x.wav").exists()


def test_speech_that_was_cut_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(self: SpokenTo, text: str, params: SpeechParams, **options: Any) -> Any:
        stream = await FakeSpeech.generate(self, text, params, **options)
        stream.output.finish_reason = "length"
        return stream

    monkeypatch.setattr(SpokenTo, "generate", cut)
    speak(TEXT, "-o", "out.wav")
    assert "the speech did not end by itself" in capsys.readouterr().err
