"""Options of adapters, as the family spells them and as an engine has them."""

from typing import Any

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.lora_config import LoRAConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_defaults() -> None:
    config = LoRAConfig()
    assert (config.enable_lm, config.enable_dit, config.enable_proj) == (True, True, False)
    assert (config.max_loras, config.max_lora_rank) == (1, 32)
    assert config.target_modules_lm == config.target_modules_dit == ATTENTION
    assert config.target_proj_modules == [
        "enc_to_lm_proj",
        "lm_to_dit_proj",
        "res_to_dit_proj",
        "fusion_concat_proj",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "LoRAConfig has no option 'r'; it has enable_lm, "),
        ({"max_lora": 8}, "LoRAConfig has no option 'max_lora'"),
        ({"max_loras": 0}, "max_loras must be at least 1, got 0"),
        ({"max_lora_rank": -1}, "max_lora_rank must be at least 1, got -1"),
        ({"max_loras": "2"}, "max_loras must be an integer, got '2'"),
        ({"enable_lm": "yes"}, "enable_lm must be True or False, got 'yes'"),
        ({"target_modules_lm": "q_proj"}, "target_modules_lm must be a list of strings"),
        ({"target_modules_lm": ["x_proj"]}, "target_modules_lm must be of q_proj, k_proj, "),
        ({"target_modules_dit": ["in_proj"]}, "target_modules_dit must be of q_proj, "),
        ({"target_proj_modules": ["stop_proj"]}, "target_proj_modules must be of enc_to_lm_proj, "),
        ({"enable_lm": False, "enable_dit": False}, "at least one of enable_lm, enable_dit"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LoRAConfig(**options)
    assert str(caught.value).startswith(message)


def test_an_engine_has_them_all() -> None:
    config = LoRAConfig(
        enable_lm=False,
        enable_proj=True,
        max_loras=4,
        max_lora_rank=8,
        target_modules_dit=["up_proj"],
        target_proj_modules=[],
    )
    engine = EngineConfig(**config.engine_options())
    assert engine.lora == config
    assert EngineConfig().lora is None
    assert EngineConfig(enable_lora=True).lora == LoRAConfig()


def test_they_cross_the_link_to_an_engine_process() -> None:
    engine = EngineConfig(enable_lora=True, lora_target_modules_lm=["q_proj", "up_proj"])
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(engine), type=EngineConfig)
    assert sent == engine
    assert sent.lora == engine.lora


def test_the_family_s_variables() -> None:
    environ = {
        "NANOVLLM_LORA_ENABLED": "true",
        "NANOVLLM_LORA_MAX_LORAS": "3",
        "NANOVLLM_LORA_MAX_LORA_RANK": "16",
        "NANOVLLM_LORA_ENABLE_LM": "false",
        "NANOVLLM_LORA_TARGET_MODULES_DIT": "q_proj,v_proj",
        "NANOVLLM_LORA_TARGET_PROJ_MODULES": "enc_to_lm_proj",
    }
    assert EngineConfig.from_env(environ).lora == LoRAConfig(
        enable_lm=False,
        max_loras=3,
        max_lora_rank=16,
        target_modules_dit=["q_proj", "v_proj"],
        target_proj_modules=["enc_to_lm_proj"],
    )
