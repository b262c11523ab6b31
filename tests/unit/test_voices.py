"""Voices: prompts that clients add, named ones on disk, and recordings encoded only once."""

import asyncio
import errno
import io
import logging
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile

from nanovllm.audio import voices
from nanovllm.audio.encoded_recordings import MAX_WAITING, EncodedRecordings
from nanovllm.audio.files import Side
from nanovllm.audio.voices import Voice, VoicePrompt, VoiceStore
from nanovllm.errors import InvalidRequestError, OverloadedError


class Encoder:
    """Latents that say what they are of; counts, and fails or waits as told."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, str | None, Side]] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, data: bytes, wav_format: str | None, side: Side) -> bytes:
        self.calls.append((data, wav_format, side))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return side.encode() + b":" + data[-8:]


def recording(seconds: float = 0.1, container: str = "WAV") -> bytes:
    file = io.BytesIO()
    samples = np.full(int(16000 * seconds), 0.1, np.float32)
    soundfile.write(file, samples, 16000, format=container)
    return file.getvalue()


async def refusal(awaitable: object, error: type[Exception] = InvalidRequestError) -> str:
    with pytest.raises(error) as caught:
        await awaitable  # type: ignore[misc]
    return str(caught.value)


# What was encoded lately.


def test_a_recording_is_encoded_once_a_side() -> None:
    async def run() -> None:
        encoder = Encoder()
        recordings = EncodedRecordings(encoder)
        assert await recordings(b"sound", "wav", "left") == b"left:sound"
        assert await recordings(b"sound", "mp3", "left") == b"left:sound"
        assert await recordings(b"sound", "wav", "right") == b"right:sound"
        assert encoder.calls == [(b"sound", "wav", "left"), (b"sound", "wav", "right")]
        large = bytes(2 << 20)
        assert await recordings(large, None, "left") == await recordings(large, None, "left")
        assert len(encoder.calls) == 3

    asyncio.run(run())


def test_the_recording_used_longest_ago_is_forgotten() -> None:
    async def run() -> None:
        encoder = Encoder()
        recordings = EncodedRecordings(encoder, max_bytes=12)
        for data in (b"a", b"b", b"a", b"c", b"a", b"b"):
            await recordings(data, None, "left")  # 6 bytes of latents each
        assert [data for data, _, _ in encoder.calls] == [b"a", b"b", b"c", b"b"]
        assert await EncodedRecordings(encoder, max_bytes=1)(b"x", None, "left") == b"left:x"

    asyncio.run(run())


def test_who_asks_for_what_is_being_encoded_waits_for_it() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        recordings = EncodedRecordings(encoder)
        first, second = (asyncio.ensure_future(recordings(b"a", None, "left")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        encoder.gate.set()
        assert await second == b"left:a"
        assert first.cancelled()
        assert len(encoder.calls) == 1

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_dropped() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        recordings = EncodedRecordings(encoder)
        asked = [asyncio.ensure_future(recordings(b"a", None, "left")) for _ in range(2)]
        await asyncio.sleep(0.01)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        again = asyncio.ensure_future(recordings(b"a", None, "left"))
        await asyncio.sleep(0.01)
        assert len(encoder.calls) == 2
        encoder.gate.set()
        assert await again == b"left:a"
        assert recordings._num_waiting_bytes == 0
        assert not recordings._running

    asyncio.run(run())


def test_two_are_encoded_at_a_time_and_not_too_many_wait() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        recordings = EncodedRecordings(encoder)
        names = [bytes([number]) for number in range(MAX_WAITING)]
        asked = [asyncio.ensure_future(recordings(name, None, "left")) for name in names]
        await asyncio.sleep(0.01)
        assert len(encoder.calls) == 2
        with pytest.raises(OverloadedError, match="64 recordings") as caught:
            await recordings(b"one more", None, "left")
        assert caught.value.reason == "requests"
        encoder.gate.set()
        assert len(await asyncio.gather(*asked)) == MAX_WAITING
        assert await recordings(b"one more", None, "left")

    asyncio.run(run())


def test_large_recordings_wait_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.audio.encoded_recordings.MAX_WAITING_BYTES", 10)

    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        recordings = EncodedRecordings(encoder)
        first = asyncio.ensure_future(recordings(bytes(11), None, "left"))  # alone it may
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await recordings(b"a", None, "left")
        encoder.gate.set()
        await first
        assert await recordings(b"a", None, "left")

    asyncio.run(run())


def test_an_error_is_everybody_s_and_not_kept() -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.error = InvalidRequestError("no sound")
        recordings = EncodedRecordings(encoder)
        asked = [recordings(b"a", None, "left") for _ in range(2)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(result) for result in results] == ["no sound"] * 2
        assert len(encoder.calls) == 1
        encoder.error = None
        assert await recordings(b"a", None, "left") == b"left:a"

    asyncio.run(run())


# Prompts.


def test_a_prompt_has_an_id_until_it_is_removed() -> None:
    async def run() -> None:
        store = VoiceStore(Encoder())
        prompt_id = await store.add_prompt(b"sound", "wav", " It says this. \n")
        assert len(prompt_id) == 32
        assert int(prompt_id, 16)
        text = " It says this. \n"  # what is spoken follows it as it stands
        assert await store.get(prompt_id) == Voice(prompt_id, text, b"left:sound")
        assert prompt_id in store
        assert list(store) == [prompt_id]
        assert store.text_of(prompt_id) == text
        assert await store.resolve(prompt_id) == VoicePrompt(b"left:sound", text)
        store.remove_prompt(prompt_id)
        assert prompt_id not in store
        not_found = f"Prompt with id {prompt_id} not found"
        assert await refusal(store.get(prompt_id)) == not_found
        assert await refusal(store.resolve(prompt_id)) == not_found
        with pytest.raises(InvalidRequestError, match=not_found):
            store.remove_prompt(prompt_id)
        with pytest.raises(InvalidRequestError, match=not_found):
            store.text_of(prompt_id)

    asyncio.run(run())


def test_a_prompt_without_text_is_a_reference() -> None:
    async def run() -> None:
        store = VoiceStore(Encoder())
        for text in ("", " \n"):
            prompt_id = await store.add_prompt(b"sound", None, text)
            assert (await store.get(prompt_id)).is_reference
            assert await store.resolve(prompt_id) == VoicePrompt(ref_audio_latents=b"right:sound")
        assert "Reference audio and a prompt without text" in await refusal(
            store.resolve(prompt_id, VoicePrompt(ref_audio_latents=b"x"))
        )

    asyncio.run(run())


def test_a_prompt_is_given_once() -> None:
    async def run() -> None:
        store = VoiceStore(Encoder())
        prompt_id = await store.add_prompt(b"sound", None, "Text.")
        assert await refusal(store.resolve(prompt_id, VoicePrompt(b"x", "y"))) == (
            "Prompt latents and prompt id cannot be provided at the same time"
        )
        assert await refusal(store.resolve(prompt_id, VoicePrompt(None, "y"))) == (
            "Prompt text and prompt id cannot be provided at the same time"
        )
        assert await refusal(store.resolve("x" * 999, VoicePrompt(b"x", "y"))) == (
            f"Prompt with id {'x' * 200} not found"
        )
        reference = VoicePrompt(ref_audio_latents=b"ref")
        assert await store.resolve(prompt_id, reference) == VoicePrompt(
            b"left:sound", "Text.", b"ref"
        )

    asyncio.run(run())


def test_prompts_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        encoder = Encoder()
        store = VoiceStore(encoder)
        monkeypatch.setattr(voices, "MAX_PROMPTS", 2)
        first, _ = [await store.add_prompt(b"1", None, "a") for _ in range(2)]
        num_encoded = len(encoder.calls)
        full = await refusal(store.add_prompt(b"1", None, "a"))
        assert full == "there are 2 prompts, of 2 that are kept: remove one first"
        assert len(encoder.calls) == num_encoded
        store.remove_prompt(first)
        monkeypatch.setattr(voices, "MAX_PROMPT_BYTES", 12)
        await store.add_prompt(b"2", None, "a")
        monkeypatch.setattr(voices, "MAX_PROMPTS", 4)
        full = await refusal(store.add_prompt(b"3", None, "a"))
        assert full.startswith("the latents of all prompts would have 18 bytes, of 12 that are")
        monkeypatch.setattr(voices, "MAX_PROMPT_BYTES", 100)
        assert "4096 characters at most" in await refusal(store.add_prompt(b"3", None, "a" * 5000))
        encoder.error = InvalidRequestError("no sound")
        assert await refusal(store.add_prompt(b"4", None, "a")) == "no sound"
        assert len(list(store)) == 2

    asyncio.run(run())


# Named voices.


def fill(directory: Path) -> None:
    (directory / "anna.wav").write_bytes(b"RIFFanna")
    (directory / "anna.txt").write_text("\ufeffShe says this.\n", encoding="utf-8")
    (directory / "小明.mp3").write_bytes(b"ID3xiaoming")
    (directory / "小明.txt").write_text("你好。", encoding="utf-8")
    (directory / "tenor.flac").write_bytes(b"fLaCtenor")
    (directory / "notes.txt").write_text("no voice")
    (directory / ".hidden.wav").write_bytes(b"RIFF")
    (directory / "deep.wav").mkdir()


def test_the_voices_of_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        fill(tmp_path)
        encoder = Encoder()
        store = VoiceStore(encoder, tmp_path)
        assert store.names == ["anna", "tenor", "小明"]
        assert encoder.calls == []
        assert store.text_of("anna") == "She says this."
        assert await store.get("anna") == Voice("anna", "She says this.", b"left:RIFFanna")
        assert await store.resolve("tenor") == VoicePrompt(ref_audio_latents=b"right:LaCtenor")
        assert (await store.get("小明")).prompt_text == "你好。"
        await store.get("anna")
        assert len(encoder.calls) == 3
        assert "notes" not in store

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [".hidden.wav is left out" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", ".", "anna.wav", "a\0b"])
def test_what_is_no_voice_is_not_looked_for(tmp_path: Path, name: str) -> None:
    async def run() -> None:
        fill(tmp_path)
        store = VoiceStore(Encoder(), tmp_path)
        with mock.patch("pathlib.Path.open", side_effect=AssertionError):
            assert name not in store
            assert "not found" in await refusal(store.get(name))
            assert "not found" in await refusal(store.remove_voice(name))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("container", "suffix"), [("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg")]
)
def test_an_added_voice_survives_a_restart(tmp_path: Path, container: str, suffix: str) -> None:
    async def run() -> None:
        store = VoiceStore(Encoder(), tmp_path)
        data = recording(container=container)
        await store.add_voice("Anna B.2", data, None, " Text. \n")
        assert {p.name for p in tmp_path.iterdir()} == {"Anna B.2.txt", f"Anna B.2.{suffix}"}
        assert await store.get("Anna B.2") == Voice("Anna B.2", "Text.", b"left:" + data[-8:])
        assert "already" in await refusal(store.add_voice("Anna B.2", data, None, "Text."))
        again = VoiceStore(Encoder(), tmp_path)
        assert await again.get("Anna B.2") == await store.get("Anna B.2")
        await again.remove_voice("Anna B.2")
        assert list(tmp_path.iterdir()) == []
        assert "Anna B.2" not in again

    asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", "..", ".x", "x.", "", " x", "x ", "a" * 65, "a\nb", "a\0b", "é/"],
)
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    async def run() -> None:
        encoder, inside = Encoder(), tmp_path / "inside"
        inside.mkdir()
        store = VoiceStore(encoder, inside)
        message = await refusal(store.add_voice(name, recording(), None, "Text."))
        assert message.startswith("a voice's name has 1 to 64 letters")
        assert encoder.calls == []
        assert list(tmp_path.rglob("*")) == [inside]

    asyncio.run(run())


def test_marks_and_joiners_are_letters(tmp_path: Path) -> None:
    async def run() -> None:
        names = ["नमस्ते", "தமிழ்", "e\u0302lise", "a\u200db"]
        for name in names:
            await VoiceStore(Encoder(), tmp_path).add_voice(name, recording(), None, "Text.")
        assert set(VoiceStore(Encoder(), tmp_path).names) == set(names)

    asyncio.run(run())


@pytest.mark.parametrize("taken", ["hand.wav", "hand.txt", "hand.flac", "hand.mp3"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_files_that_somebody_put_there_meanwhile_stay(
    tmp_path: Path, taken: str, kind: str
) -> None:
    async def run() -> None:
        encoder = Encoder()
        store, path = VoiceStore(encoder, tmp_path), tmp_path / taken
        if kind == "file":
            path.write_text("mine")
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to(tmp_path / "nowhere")
        message = await refusal(store.add_voice("hand", recording(), None, "Text."))
        assert message.startswith(f"the directory of voices has a file {taken!r} already")
        assert encoder.calls == []
        assert list(tmp_path.iterdir()) == [path]
        assert kind != "file" or path.read_text() == "mine"

    asyncio.run(run())


def test_a_name_that_is_too_long_for_a_file(tmp_path: Path) -> None:
    async def run() -> None:
        store = VoiceStore(Encoder(), tmp_path)
        message = await refusal(store.add_voice("𠀁" * 64, recording(), None, "Text."))
        assert message == "a voice that is kept has a name of 240 bytes at most"
        await store.add_voice("𠀁" * 60, recording(), None, "Text.")

    asyncio.run(run())


def test_a_voice_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        store = VoiceStore(Encoder(), tmp_path)
        replace = os.replace

        def no_room(source: Path, target: Path) -> None:
            if target.suffix == ".wav":
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        with mock.patch("os.replace", no_room), pytest.raises(OSError, match="No space"):
            await store.add_voice("x", recording(), None, "Text.")
        assert list(tmp_path.iterdir()) == []
        assert store.names == []

    asyncio.run(run())


def test_two_add_a_voice_of_one_name_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        encoder = Encoder()
        encoder.gate.clear()
        store = VoiceStore(encoder, tmp_path)
        adding = asyncio.ensure_future(store.add_voice("x", recording(), None, "One."))
        await asyncio.sleep(0)
        other = recording(container="FLAC")
        assert "already" in await refusal(store.add_voice("x", other, None, "Two."))
        assert "already" in await refusal(store.remove_voice("x"))
        encoder.gate.set()
        await adding
        assert {file.name for file in tmp_path.iterdir()} == {"x.wav", "x.txt"}
        results = await asyncio.gather(
            store.remove_voice("x"), store.remove_voice("x"), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), InvalidRequestError]
        assert list(tmp_path.iterdir()) == []
        await store.add_voice("x", other, None, "Two.")
        assert (await store.get("x")).prompt_text == "Two."

    asyncio.run(run())


def test_a_voice_that_is_removed_while_it_is_encoded(tmp_path: Path) -> None:
    async def run() -> None:
        fill(tmp_path)
        encoder = Encoder()
        store = VoiceStore(encoder, tmp_path)
        encoder.gate.clear()
        getting = asyncio.ensure_future(store.get("anna"))
        while not encoder.calls:
            await asyncio.sleep(0.001)
        await store.remove_voice("anna")
        encoder.gate.set()
        assert (await getting).prompt_text == "She says this."
        assert "not found" in await refusal(store.get("anna"))
        await store.add_voice("anna", recording(), None, "Another.")
        assert (await store.get("anna")).prompt_text == "Another."

    asyncio.run(run())


def test_what_is_not_kept(tmp_path: Path) -> None:
    async def run() -> None:
        encoder = Encoder()
        store = VoiceStore(encoder, tmp_path)
        assert "must be a WAV, FLAC" in await refusal(store.add_voice("x", b"what", None, "Text."))
        encoder.error = InvalidRequestError("no sound")
        assert await refusal(store.add_voice("x", recording(), None, "Text.")) == "no sound"
        assert list(tmp_path.iterdir()) == []
        nowhere = VoiceStore(encoder)
        for awaitable in (nowhere.add_voice("x", recording(), None), nowhere.remove_voice("x")):
            assert "named voices need a directory" in await refusal(awaitable)

    asyncio.run(run())


def test_a_directory_that_changes_behind_our_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        fill(tmp_path)
        store = VoiceStore(Encoder(), tmp_path)
        (tmp_path / "anna.wav").unlink()
        message = await refusal(store.get("anna"))
        assert message == "the recording of voice 'anna' cannot be read"

    asyncio.run(run())
    with pytest.raises(FileNotFoundError, match="directory of voices does not exist"):
        VoiceStore(Encoder(), tmp_path / "none")


@pytest.mark.parametrize("text", [b"\xff\xfe\xff", b"a" * 4097, "字".encode() * 30_000, None])
def test_a_text_that_is_none_leaves_its_voice_out(tmp_path: Path, text: bytes | None) -> None:
    fill(tmp_path)
    if text is None:
        (tmp_path / "anna.txt").unlink()
        (tmp_path / "anna.txt").mkdir()
    else:
        (tmp_path / "anna.txt").write_bytes(text)
    assert VoiceStore(Encoder(), tmp_path).names == ["tenor", "小明"]


def test_a_recording_that_cannot_be_used_is_told_by_its_voice(tmp_path: Path) -> None:
    async def run() -> None:
        fill(tmp_path)
        encoder = Encoder()
        encoder.error = InvalidRequestError("cannot decode the recording")
        message = await refusal(VoiceStore(encoder, tmp_path).get("anna"))
        assert message == "voice 'anna' cannot be used: cannot decode the recording"

    asyncio.run(run())
