"""Gemma 3: its configs as transformers reads them, alone and within a model that sees images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.bench.quality import hidden_states, log_probs
from nanovllm.errors import InvalidRequestError
from nanovllm.models.model_config import ModelConfig
from tests.conftest import CHECKPOINTS, TINY, spread_out

GEMMA = {"architectures": ["Gemma3ForCausalLM"]}
SMALL = GEMMA | {  # as the model of 1 B parameters was released
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
SEEING = {  # as that of 4 B parameters was, for what writes in it
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
LARGE = {  # as that of 27 B parameters was
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


@pytest.mark.parametrize("raw", [SMALL, SEEING, LARGE, {}], ids=["1b", "4b", "27b", "none"])
@pytest.mark.parametrize("is_saved", [False, True], ids=["released", "saved"])
def test_a_config_is_read_as_transformers_reads_it(raw: dict[str, Any], is_saved: bool) -> None:
    theirs = transformers.Gemma3TextConfig(**raw)
    ours = ModelConfig.from_dict((theirs.to_dict() if is_saved else raw) | GEMMA)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.query_pre_attn_scalar == theirs.query_pre_attn_scalar
    assert ours.tie_word_embeddings
    assert ours.activation == "gelu_tanh"
    assert ours.max_model_len == theirs.max_position_embeddings
    has_window = [kind == "sliding_attention" for kind in theirs.layer_types or ()]
    assert ours.windows == tuple(theirs.sliding_window if w else None for w in has_window)
    assert ours.window_rope is not None
    assert theirs.rope_parameters is not None
    for rope, kind in ((ours.rope, "full_attention"), (ours.window_rope, "sliding_attention")):
        expected = theirs.rope_parameters[kind]
        assert rope.theta == expected["rope_theta"]
        assert rope.rope_type == expected["rope_type"]
        assert rope.scaling.get("factor") == expected.get("factor")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attn_logit_softcapping", 50.0, "is not supported"),
        ("final_logit_softcapping", 30.0, "is not supported"),
        ("use_bidirectional_attention", True, "both directions"),
        ("hidden_activation", "relu", "supported: silu, swish, gelu_pytorch_tanh"),
        ("sliding_window", None, "must be a positive integer, not None"),
        ("sliding_window_pattern", 0, "must be a positive integer, not 0"),
        ("query_pre_attn_scalar", -1, "must be a positive number, not -1"),
        ("hidden_activation", ["silu"], "supported: silu"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5 is not supported"),
        ("rope_parameters", {"rope_theta": 5.0}, "must be by the type of a layer"),
        ("rope_scaling", {"full_attention": {"factor": 2.0}}, "are not supported here"),
        ("rope_local_base_freq", "fast", "must be a positive number, not 'fast'"),
        ("layer_types", ["full_attention"], "there must be one for each layer"),
        ("layer_types", ["chunked_attention"], "layer type 'chunked_attention' is not supported"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false"),
    ],
)
def test_what_would_change_its_words_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ModelConfig.from_dict(SMALL | {field: value})


def test_null_is_left_out() -> None:
    nulls = dict.fromkeys(("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"))
    assert ModelConfig.from_dict(SMALL | nulls) == ModelConfig.from_dict(SMALL)
    linear = {"rope_type": None, "type": "linear", "factor": 8.0}
    assert ModelConfig.from_dict(SMALL | {"rope_scaling": linear}).max_model_len == 32768


def test_others_do_not_have_its_fields() -> None:
    raw = SMALL | {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}
    qwen = ModelConfig.from_dict(raw | {"query_pre_attn_scalar": 16, "hidden_activation": None})
    assert (qwen.query_pre_attn_scalar, qwen.activation) == (None, "silu")
    assert (qwen.embedding_scale, qwen.window_rope) == (1.0, None)


def test_it_does_not_run_in_float16_by_itself() -> None:
    assert ModelConfig.from_dict(SMALL | {"dtype": "float16"}).dtype == "bfloat16"


def test_what_is_said_of_a_model_that_sees_images_as_a_whole() -> None:
    seeing = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    text_config = SEEING | {"eos_token_id": 1, "tie_word_embeddings": True}
    config = ModelConfig.from_dict(
        seeing | {"text_config": text_config, "tie_word_embeddings": False}
    )
    assert config.eos_token_ids == (1, 106)
    assert not config.tie_word_embeddings
    with pytest.raises(InvalidRequestError, match="lacks 'text_config'"):
        ModelConfig.from_dict(seeing)


@pytest.mark.parametrize("is_new", [False, True], ids=["released", "renamed"])
def test_what_writes_in_a_model_that_sees_images(tmp_path: Path, is_new: bool) -> None:
    text = TINY | CHECKPOINTS["gemma3"][1]
    del text["tie_word_embeddings"]  # whose default is true
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=sight,
        mm_tokens_per_image=4,
        image_token_index=300,
        tie_word_embeddings=False,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    spread_out(model)
    model.save_pretrained(tmp_path)
    if is_new:
        stored = load_file(tmp_path / "model.safetensors")
        renamed = {
            name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head.", "lm_head."
            ): tensor
            for name, tensor in stored.items()
        }
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    prompt = [7, 250, 31, 4] * 20
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(tmp_path), dtype="float32") as llm:
        ids = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == ids


@torch.inference_mode()
def test_bfloat16_diverges_no_more_than_that_of_transformers(
    checkpoint: Callable[[str], Path],
) -> None:
    """Its norms and embeddings are scaled before they are rounded, or after, as in training."""
    directory = checkpoint("gemma3")
    ids = torch.randint(320, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)(torch.tensor([ids])).logits[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    with LLM(str(directory), dtype="bfloat16") as llm:
        ours = log_probs(llm, hidden_states(llm, ids))
    expected, *found = (x.double().log_softmax(-1) for x in (exact, ours, theirs))
    ours_sum, theirs_sum = (float((expected.exp() * (expected - x)).sum()) for x in found)
    assert ours_sum <= 1.1 * theirs_sum
