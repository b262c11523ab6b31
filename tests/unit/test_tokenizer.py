"""Tokenizers: held to transformers on whole texts, and to themselves on streams of ids."""

import json
import random
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovllm.errors import InvalidRequestError, UnsupportedModelError
from nanovllm.text.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "你好 世界。今天天气很好。 Ünïcödé und Straße; naïve café",
] * 8
TEXTS = [
    "Hello world, how are you?",
    "  two spaces, a\ttab and a\nline  ",
    "你好世界! 今天 e\u0301 q\u0308 ཨོཾ ไทย",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 🇩🇪, then 👍🏽.",
    "the \ufffd itself \ufffd\ufffd is text too",
    "",
]
EMOJI = "Hi 👩‍👩‍👧 你好 e\u0301! 🏳️‍🌈 ok"


@lru_cache
def byte_level() -> Tokenizer:
    """A BPE over bytes, as GPT-2 and Qwen have it; emoji take four ids and more."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>", "</tool>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@lru_cache
def sentencepiece() -> Tokenizer:
    """A BPE over characters with byte fallback and a space before the first word, as in Llama 2."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special + byte_tokens, show_progress=False
    )
    backend.train_from_iterator([text.split("你")[0] for text in CORPUS], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZERS = [pytest.param(byte_level, id="byte-level"), pytest.param(sentencepiece, id="spm")]


def save(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    return [detokenizer.push(token_id) for token_id in ids]


CONFIGS: list[dict[str, Any]] = [
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "add_bos_token": True},
    {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True, "add_bos_token": False},
    {"eos_token": "<|new_end|>", "additional_special_tokens": ["<|extra|>"]},
    {"eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}},
    {"eos_token": "</s>", "split_special_tokens": True},
]


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_equals_transformers(build: Any, config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for token in config.values():
        if isinstance(token, dict) and "content" in token:
            fields = ("lstrip", "rstrip", "single_word", "normalized")
            token |= {"__type": "AddedToken", **dict.fromkeys(fields, False)}
    path = save(tmp_path, build(), tokenizer_class="PreTrainedTokenizerFast", **config)
    ours = Tokenizer.from_directory(path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    for text in [*TEXTS, "a<s>b</s> c<|new_end|><|extra|> <image>d"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.encode_batch(TEXTS) == theirs(TEXTS)["input_ids"]
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_the_file_counts_and_not_the_class(name: str, tmp_path: Path) -> None:
    """Of these classes transformers 5 makes a pipeline of its own."""
    path = save(tmp_path, sentencepiece(), tokenizer_class=name, bos_token="<s>", eos_token="</s>")
    ours = Tokenizer.from_directory(path)
    file = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in [*TEXTS, "<s>the fox", "<s> the fox</s>the dog"]:
        for special in (True, False):
            assert ours.encode(text, special) == file.encode(text, add_special_tokens=special).ids


def test_reads_added_tokens_and_the_older_map(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level(), bos_token="<s>")
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    added = {"content": "<think>", "lstrip": False, "rstrip": False, "special": False}
    save(path, byte_level(), added_tokens_decoder={"9999": added}, eos_token="</s>")
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.special_tokens == {"eos_token": "</s>"}
    assert tokenizer.encode("<think>") == [byte_level().vocab_size]
    assert tokenizer.decode([byte_level().vocab_size]) == "<think>"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_directory(save(tmp_path, Tokenizer(backend)))
    assert tokenizer.encode(EMOJI) == byte_level().encode(EMOJI)
    assert tokenizer.eos_token_id is None


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="not JSON"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b"[1]", r"must hold a JSON object, not \[1\]"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer_config.json", b'{"x": "\xff"}', "is not UTF-8"),
        ("special_tokens_map.json", b"[1]", "must hold a JSON object"),
        ("chat_template.json", b"{", "is not JSON"),
        ("chat_template.json", b"[]", "must hold a JSON object"),
        ("chat_template.json", b'{"chat_template": 5}', "chat_template must be a text, or a list"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
        ("additional_chat_templates/rag.jinja", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_files_of_another_shape_are_named(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    path = save(tmp_path, byte_level())
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"{file}.* {message}"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("added_tokens_decoder", [1]),
        ("added_tokens_decoder", {"x": {"content": "a"}}),
        ("added_tokens_decoder", {"1": "a"}),
        ("added_tokens_decoder", {"1": {"content": 5}}),
        ("added_tokens_decoder", {"1": {"content": "a", "lstrip": None}}),
        ("chat_template", 5),
        ("chat_template", ["x"]),
        ("chat_template", [{"x": 1}]),
        ("chat_template", [{"name": "default", "template": None}]),
        ("extra_special_tokens", "abc"),
        ("additional_special_tokens", "abc"),
        ("split_special_tokens", "false"),
        ("split_special_tokens", 1),
    ],
)
def test_settings_of_another_shape_are_named(tmp_path: Path, name: str, value: Any) -> None:
    path = save(tmp_path, byte_level(), **{name: value})
    with pytest.raises(UnsupportedModelError, match=rf"tokenizer_config.json: {name} must be"):
        Tokenizer.from_directory(path)


def test_settings_that_are_null_are_left_out(tmp_path: Path) -> None:
    names = ("added_tokens_decoder", "chat_template", "extra_special_tokens")
    path = save(tmp_path, byte_level(), **dict.fromkeys(names), split_special_tokens=None)
    assert Tokenizer.from_directory(path).encode("<s>") == byte_level().encode("<s>")


def test_converts_older_files_with_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    byte_level().backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode(EMOJI)) == EMOJI
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"nanovllm\[transformers\]"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("build", TOKENIZERS)
def test_token_texts_join_to_the_text(build: Any) -> None:
    tokenizer = build()
    text = "Hello world, how</s>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).removeprefix(" ") == text
    assert tokenizer.token_text(tokenizer.end_id + 5) == ""


@pytest.mark.parametrize("build", TOKENIZERS)
def test_ids_outside_the_vocabulary_are_nothing(build: Any) -> None:
    tokenizer = build()
    ids = tokenizer.encode("Hello")
    strange = [-1, tokenizer.end_id, 2**31, 2**40]
    assert tokenizer.decode(ids + strange) == "Hello"
    assert stream(tokenizer, [], ids + strange)[-4:] == [""] * 4


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("text", [*TEXTS[:4], EMOJI])
def test_streams_whole_characters_from_every_cut(build: Any, text: str) -> None:
    tokenizer = build()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    for cut in range(len(ids) + 1):
        pieces = stream(tokenizer, ids[:cut], ids[cut:])
        assert not any(REPLACEMENT in piece for piece in pieces)
        prompt = tokenizer.decode(ids[:cut])
        whole = next(n for n in range(len(text), -1, -1) if prompt.startswith(text[:n]))
        assert text.endswith("".join(pieces))
        # Where byte fallback spoils a run of bytes, the prompt alone decodes to less than its text.
        if REPLACEMENT not in prompt:
            assert "".join(pieces) == text[whole:]


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("cut", range(1, 12))
def test_the_prompt_never_leaks(build: Any, cut: int) -> None:
    """A prompt may end in half a character, or in a character that looks like half of one."""
    tokenizer = build()
    ids = tokenizer.encode("secret words \ufffd and 👩‍👩‍👧")
    after = tokenizer.encode("ok then", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids[:-cut], after)).strip() == "ok then"


@pytest.mark.parametrize("build", TOKENIZERS)
def test_replacement_characters_of_the_text_are_kept(build: Any) -> None:
    tokenizer = build()
    text = f"a {REPLACEMENT * 200} b"
    assert "".join(stream(tokenizer, [], tokenizer.encode(text))) == text
    ids = tokenizer.encode(f"say {REPLACEMENT}")
    more = tokenizer.encode("x", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, more)).strip() == "x"


@pytest.mark.parametrize("build", TOKENIZERS)
def test_half_a_character_at_the_end_is_dropped(build: Any) -> None:
    tokenizer = build()
    ids = tokenizer.encode("Hi 👩")
    assert "".join(stream(tokenizer, [], ids[:-1])) == "Hi "


def test_goes_on_after_a_broken_run_of_bytes() -> None:
    """你 is out when its run of bytes turns out to be broken, and DecodeStream gives up."""
    tokenizer = sentencepiece()
    ids = tokenizer.encode("a 你", add_special_tokens=False)
    ids += tokenizer.encode("好", add_special_tokens=False)[-3:-2]
    ids += tokenizer.encode(" the world", add_special_tokens=False)[1:]
    assert "".join(stream(tokenizer, [], ids)) == "a 你 the world"


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("seed", range(20))
def test_survives_random_ids(build: Any, seed: int) -> None:
    tokenizer = build()
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.end_id + 3) for _ in range(300)]
    cut = draw.randrange(40)
    stream(tokenizer, ids[:cut], ids[cut:])
    text, whole = "".join(stream(tokenizer, [], ids)), tokenizer.decode(ids)
    if build is byte_level:
        assert whole.startswith(text)
        assert text == whole or whole.endswith(REPLACEMENT)


def test_endless_halves_are_bounded() -> None:
    tokenizer = byte_level()
    half = tokenizer.encode("👩")[0]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(half) for _ in range(1000))
    assert set(text) == {REPLACEMENT}
    assert len(detokenizer._pending) <= Detokenizer.MAX_PENDING


def test_special_tokens_and_the_spaces_between() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a</s><tool>b<|im_end|>")
    assert "".join(stream(tokenizer, [], ids)) == "a<tool>b"
    assert "".join(stream(tokenizer, [], ids, skip_special_tokens=False)) == tokenizer.decode(
        ids, skip_special_tokens=False
    )
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    words.add_special_tokens(["<x>", "<y>"])
    spaced = Tokenizer(words)
    assert "".join(stream(spaced, [], [0, 2, 3, 1], skip_special_tokens=False)) == "a <x> <y> b"
    glued = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    assert "".join(stream(spaced, [], [0, 2, 3, 1], **glued)) == "a <x><y> b"


@given(st.text(max_size=30), st.data())
@settings(max_examples=150, deadline=None)
def test_any_text_streams_back(text: str, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))()
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer, ids[:cut])
    pieces = [detokenizer.push(token_id) for token_id in ids[cut:]]
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
    if REPLACEMENT not in whole + prompt:
        assert prompt + "".join(pieces) == whole


GUARD = (
    "{{ bos_token + '' }}{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}"
    "{% endif %}{% for message in messages %}[{{ message.role }}]"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
"""Reads parts alone, as Llama Guard's."""


def test_a_template_that_reads_only_parts_gets_text_as_one() -> None:
    tokenizer = byte_level()
    user = {"role": "user", "content": " Is this safe? "}
    chat = [user, {"role": "assistant", "content": "Yes, "}]
    render = partial(
        tokenizer.apply_chat_template, chat_template=GUARD, add_generation_prompt=False
    )
    assert render(chat) == "<s>[user]Is this safe?[assistant]Yes,"
    assert render([user | {"content": [{"type": "text", "text": "a"}]}]) == "<s>[user]a"
    assert render(chat, continue_final_message=True) == "<s>[user]Is this safe?[assistant]Yes,"
    assert render([{"role": "user"}]) == "<s>[user]"
    with pytest.raises(InvalidRequestError, match="user first"):
        render([user | {"role": "system"}])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}", "hi"),
        (
            "{% if messages[0].content is string %}text{{ messages[0].content }}{% endif %}",
            "texthi",
        ),
        ("{{ messages[0].content | capitalize }}", "Hi"),
        ("nothing", "nothing"),
    ],
)
def test_other_templates_get_text(template: str, text: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert byte_level().apply_chat_template(messages, chat_template=template) == text


def test_chat_template_of_a_directory(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level(), bos_token="<s>", chat_template="{{ bos_token }}[config]")
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer.from_directory(path).apply_chat_template(messages) == "<s>[config]"
    tokenizer = Tokenizer.from_directory(path, chat_template="{{ messages[0].content }}{{ x }}")
    assert tokenizer.apply_chat_template(messages, x=1) == "hi1"
    with pytest.raises(InvalidRequestError, match="'messages' is an argument"):
        tokenizer.apply_chat_template(messages, messages=[])
    with pytest.raises(InvalidRequestError, match="no default chat template"):
        byte_level().apply_chat_template(messages)
