"""A request for speech becomes the model's prompt, or an error that says what to change."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nanovllm.audio.frontend import SpeechFrontend
from nanovllm.audio.sentences import clean_text
from nanovllm.batch import patch_key
from nanovllm.config import EngineConfig
from nanovllm.errors import ContextLengthError, InvalidRequestError, UnsupportedModelError
from nanovllm.speech_params import SpeechParams
from tests.voxcpm_oracle import import_reference

PATCH = {"v1": 2 * 16, "v1.5": 4 * 16, "v2": 4 * 16}
"""Values of a patch in the tiny checkpoints."""


@pytest.fixture(scope="module")
def frontend(speech_checkpoint: Callable[..., Path]) -> Callable[[str], SpeechFrontend]:
    return lambda kind: SpeechFrontend(speech_checkpoint(kind), EngineConfig())


@pytest.fixture(scope="module")
def reference_tokenizer(
    speech_checkpoint: Callable[..., Path],
) -> Callable[[str], list[int]]:
    import_reference()
    from transformers import LlamaTokenizerFast
    from voxcpm.model.utils import (  # type: ignore[import-untyped]
        mask_multichar_chinese_tokens,
    )

    backend = LlamaTokenizerFast.from_pretrained(str(speech_checkpoint("v2")))
    tokenize: Callable[[str], list[int]] = mask_multichar_chinese_tokens(backend)
    return tokenize


def latents(kind: str, num_patches: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).standard_normal((num_patches, PATCH[kind]))
    return values.astype("<f4").tobytes()


def keys_of(kind: str, data: bytes) -> list[bytes]:
    size = PATCH[kind] * 4
    return [patch_key(data[i : i + size]) for i in range(0, len(data), size)]


TEXTS = [
    "hello",
    "the weather is well",
    "Hello, world! (really?)",
    "你好世界",
    "今天天气很好",
    "hello 你好 world 世界",
    "今天 天气",
    "你",
    "ünïcödé 🙂 字",
    "a  b\n\nc\t d ",
    "</s><s>x",
    "1234567890" * 20,
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_the_reference_s(
    frontend: Callable[[str], SpeechFrontend],
    reference_tokenizer: Callable[[str], list[int]],
    text: str,
) -> None:
    assert frontend("v2").tokenizer.encode(clean_text(text)) == reference_tokenizer(
        clean_text(text)
    )


def test_chinese_is_read_by_the_character(frontend: Callable[[str], SpeechFrontend]) -> None:
    tokenizer = frontend("v2").tokenizer
    backend = tokenizer._backend
    assert "你好" in backend.encode("你好", add_special_tokens=False).tokens[-1]
    expected = [backend.token_to_id(character) for character in "你好"]
    assert tokenizer.encode("你好")[-2:] == expected


@pytest.mark.parametrize("kind", ["v1", "v1.5", "v2"])
def test_zero_shot(frontend: Callable[[str], SpeechFrontend], kind: str) -> None:
    one = frontend(kind)
    item = one.process("hello\n  world", SpeechParams(seed=7, cfg_value=1.5, min_len=3), 512)
    text = one.tokenizer.encode("hello world")
    assert item.keys == [*text, 101]
    assert item.num_target_tokens == len(text)
    assert (item.params.max_tokens, item.params.seed) == (6 * len(text) + 10, 7)
    assert (item.payload.latents, item.payload.cfg_value, item.payload.min_len) == (b"", 1.5, 3)
    assert (item.payload.inference_timesteps, item.payload.temperature) == (10, 1.0)


@pytest.mark.parametrize("kind", ["v1", "v1.5", "v2"])
def test_continuation(frontend: Callable[[str], SpeechFrontend], kind: str) -> None:
    one = frontend(kind)
    prompt = latents(kind, 5)
    item = one.process("world", SpeechParams(), 512, prompt, "hello ")
    assert item.keys == [*one.tokenizer.encode("hello world"), 101, *keys_of(kind, prompt)]
    assert item.payload.latents == prompt
    assert item.num_target_tokens == len(one.tokenizer.encode("world"))


def test_reference(frontend: Callable[[str], SpeechFrontend]) -> None:
    one, reference = frontend("v2"), latents("v2", 3, 1)
    item = one.process("world", SpeechParams(), 512, ref_audio_latents=reference)
    text = one.tokenizer.encode("world")
    assert item.keys == [103, *keys_of("v2", reference), 104, *text, 101]
    assert item.payload.latents == reference


def test_reference_and_continuation(frontend: Callable[[str], SpeechFrontend]) -> None:
    one, reference, prompt = frontend("v2"), latents("v2", 3, 1), latents("v2", 2)
    item = one.process("world", SpeechParams(), 512, prompt, "hello ", reference)
    assert item.keys == [
        *(103, *keys_of("v2", reference), 104),
        *one.tokenizer.encode("hello world"),
        *(101, *keys_of("v2", prompt)),
    ]
    assert item.payload.latents == reference + prompt


def test_the_description_of_a_voice_is_text(frontend: Callable[[str], SpeechFrontend]) -> None:
    one, text = frontend("v2"), "(A young woman, gentle voice)Hello."
    assert one.process(text, SpeechParams(), 512).keys == [*one.tokenizer.encode(text), 101]


def test_the_text_or_the_request_caps_the_speech(
    frontend: Callable[[str], SpeechFrontend],
) -> None:
    one = frontend("v1")
    num_tokens = len(one.tokenizer.encode("hello"))
    item = one.process("hello", SpeechParams(max_generate_length=5, min_len=2**70), 512)
    assert (item.params.max_tokens, item.payload.min_len) == (5, 5)
    item = one.process("hello", SpeechParams(max_generate_length=10**6), 512)
    assert item.params.max_tokens == 6 * num_tokens + 10
    params = SpeechParams(retry_badcase_ratio_threshold=2.5)
    assert one.process("hello", params, 512).params.max_tokens == int(2.5 * num_tokens + 10)


@pytest.mark.parametrize("text", ["", " ", "\n\t ", None, 5, b"hello"])
def test_no_text(frontend: Callable[[str], SpeechFrontend], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        frontend("v1").process(text, SpeechParams(), 512)
    assert str(caught.value) == "target text must be a non-empty string"


def refusal(one: SpeechFrontend, kind: str, **options: str | bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        one.process("hello", SpeechParams(), 512, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_only_what_is_to_be_said_is_cleaned(frontend: Callable[[str], SpeechFrontend]) -> None:
    """As in the reference."""
    one, prompt = frontend("v1"), latents("v1", 2)
    made = one.process("a \n b", SpeechParams(), 512, prompt_latents=prompt, prompt_text=" c  d\n")
    ids = one.tokenizer.encode(" c  d\na b")
    assert made.keys[: len(ids) + 1] == [*ids, 101]


def test_prompts_that_are_not_whole(frontend: Callable[[str], SpeechFrontend]) -> None:
    one, prompt = frontend("v1"), latents("v1", 2)
    assert refusal(one, "v1", prompt_text="hi") == (
        "Prompt text is not allowed when prompt latents are not provided"
    )
    for text in ("", "  "):
        assert refusal(one, "v1", prompt_latents=prompt, prompt_text=text) == (
            "Prompt text is required when prompt latents are provided"
        )
    assert refusal(one, "v1", ref_audio_latents=prompt) == (
        "Reference audio is not supported by the loaded model"
    )


@pytest.mark.parametrize("field", ["prompt_latents", "ref_audio_latents"])
@pytest.mark.parametrize("size", [0, 4, 64 * 4 - 1, 64 * 4 + 4, 64 * 3 * 4 - 16 * 4])
def test_latents_that_are_no_patches(
    frontend: Callable[[str], SpeechFrontend], field: str, size: int
) -> None:
    options: dict[str, str | bytes] = {field: bytes(size)}
    if field == "prompt_latents":
        options["prompt_text"] = "hi"
    assert refusal(frontend("v2"), "v2", **options) == (
        f"{field}: {size} bytes are no patches of 4 x 16 float32 values, 256 bytes each"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_not_finite(
    frontend: Callable[[str], SpeechFrontend], value: float
) -> None:
    values = np.zeros(64, "<f4")
    values[63] = value
    assert (
        refusal(frontend("v2"), "v2", prompt_latents=values.tobytes(), prompt_text="hi")
        == "prompt_latents: it has values that are NaN or infinite"
    )
    values[:] = 3e38
    assert (
        refusal(frontend("v2"), "v2", prompt_latents=values.tobytes(), prompt_text="hi")
        == "prompt_latents: it has values that no recording has"
    )


def test_what_does_not_fit_the_context(frontend: Callable[[str], SpeechFrontend]) -> None:
    one, params = frontend("v1"), SpeechParams(max_generate_length=2000)
    num_tokens = len(one.tokenizer.encode("hello"))
    needed = num_tokens + 1 + 6 * num_tokens + 10
    one.process("hello", params, needed)
    with pytest.raises(ContextLengthError) as caught:
        one.process("hello", params, needed - 1)
    assert str(caught.value) == (
        f"Request may exceed max_model_len: prompt_len({num_tokens + 1}) + "
        f"max_generate_length({6 * num_tokens + 10}) = {needed} > max_model_len({needed - 1}). "
        "Reduce input length or max_generate_length, or increase max_model_len."
    )
    one.process("hello", SpeechParams(max_generate_length=1), num_tokens + 2)
    what_is_left = one.process("hello", SpeechParams(), num_tokens + 4).params.max_tokens
    assert what_is_left == 3
    with pytest.raises(ContextLengthError) as caught:
        one.process("hello", SpeechParams(max_generate_length=1), num_tokens)
    assert str(caught.value) == (
        f"Prompt is too long for max_model_len: prompt_len={num_tokens + 1} > "
        f"max_model_len={num_tokens}"
    )


@pytest.mark.parametrize("size", [100_000, 4_000_000])
def test_very_long_texts(frontend: Callable[[str], SpeechFrontend], size: int) -> None:
    start = time.process_time()
    with pytest.raises(ContextLengthError, match="Prompt is too long for max_model_len: "):
        frontend("v1").process("word " * (size // 5), SpeechParams(), 4096)
    assert time.process_time() - start < 2


def test_a_long_prompt(frontend: Callable[[str], SpeechFrontend]) -> None:
    with pytest.raises(ContextLengthError, match="prompt_len=") as caught:
        frontend("v1").process("hello", SpeechParams(), 512, latents("v1", 600), "hi")
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("num_prompt", "prompt_text", "num_reference", "param"),
    [
        (600, "hi", 0, "prompt_latents"),
        (511, "hi", 0, "prompt_latents"),
        (0, "", 511, "ref_audio_latents"),
        (200, "hi", 312, "ref_audio_latents"),
        (2, "x" * 600, 0, "prompt_text"),
        (2, "x" * 60_000, 0, "prompt_text"),
        (2, "hi", 2, "text"),
    ],
)
def test_what_a_long_prompt_is_blamed_on(
    frontend: Callable[[str], SpeechFrontend],
    num_prompt: int,
    prompt_text: str,
    num_reference: int,
    param: str,
) -> None:
    prompt = latents("v2", num_prompt) if num_prompt else None
    reference = latents("v2", num_reference) if num_reference else None
    text = "z" * 600 if param == "text" else "a"
    with pytest.raises(ContextLengthError, match="Prompt is too long") as caught:
        frontend("v2").process(text, SpeechParams(), 512, prompt, prompt_text, reference)
    assert caught.value.param == param


def test_too_many_latents_are_refused_before_they_are_hashed(
    frontend: Callable[[str], SpeechFrontend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.audio.frontend.patch_key", None)
    with pytest.raises(ContextLengthError, match="prompt_len=65 > max_model_len=64"):
        frontend("v2").process("a", SpeechParams(), 64, latents("v2", 65), "b")


def test_half_a_character(frontend: Callable[[str], SpeechFrontend]) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        frontend("v1").process("\ud83d", SpeechParams(), 512)


def test_a_tokenizer_of_another_model(
    speech_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(speech_checkpoint("v1"), directory)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 105'))
    one = SpeechFrontend(directory, EngineConfig())
    with pytest.raises(InvalidRequestError, match="the tokenizer is another model's"):
        one.process("hello", SpeechParams(), 512)


def test_broken_directories(speech_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(speech_checkpoint("v1"), directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="is not a tokenizer"):
        SpeechFrontend(directory, EngineConfig())
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        SpeechFrontend(directory, EngineConfig())
    elsewhere = EngineConfig(tokenizer=str(speech_checkpoint("v1")))
    assert SpeechFrontend(directory, elsewhere).tokenizer.encode("hello")


@pytest.mark.parametrize(("kind", "samples"), [("v1", 1280), ("v1.5", 7056), ("v2", 2560)])
def test_recordings_are_padded_to_patches(
    frontend: Callable[[str], SpeechFrontend], kind: str, samples: int
) -> None:
    assert frontend(kind).samples_per_patch == samples
