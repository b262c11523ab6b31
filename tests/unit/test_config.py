"""Engine options: defaults, aliases, the environment, and what is refused."""

from dataclasses import fields, replace
from typing import Any

import pytest

from nanovllm.config import (
    ALIASES,
    EngineConfig,
    Options,
    PoolConfig,
    ServerConfig,
    SpeechConfig,
    split_options,
)
from nanovllm.config.attention import ATTENTION_BACKENDS
from nanovllm.config.server import MAX_PROMPTS
from nanovllm.errors import InvalidRequestError

DEFAULTS: dict[str, Any] = {
    "model": None,
    "tokenizer": None,
    "chat_template": None,
    "model_source": "huggingface",
    "revision": None,
    "download_dir": None,
    "hf_token": None,
    "endpoint": None,
    "local_files_only": False,
    "dummy_weights": False,
    "device": "auto",
    "dtype": "auto",
    "max_model_len": None,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "block_size": None,
    "num_kv_blocks": None,
    "kv_cache_memory_bytes": None,
    "gpu_memory_utilization": 0.9,
    "enable_prefix_caching": True,
    "max_cached_tokens": None,
    "async_scheduling": None,
    "tensor_parallel_size": 1,
    "attention_backend": "auto",
    "enforce_eager": False,
    "max_cudagraph_capture_size": None,
    "compile_model": False,
    "kv_cache_dtype": "auto",
    "quantization": None,
    "deterministic": False,
    "disable_cascade_attn": False,
    "cpu_threads": None,
    "cpu_isa": "auto",
    "seed": 0,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 32,
    "lora_enable_lm": True,
    "lora_enable_dit": True,
    "lora_enable_proj": False,
    "lora_target_modules_lm": None,
    "lora_target_modules_dit": None,
    "lora_target_proj_modules": None,
}
VALUES: dict[str, tuple[str, Any]] = {
    "model": ("some/model", "some/model"),
    "tokenizer": ("/a/path", "/a/path"),
    "chat_template": ("{{ x }}", "{{ x }}"),
    "model_source": ("modelscope", "modelscope"),
    "revision": ("main", "main"),
    "download_dir": ("/downloads", "/downloads"),
    "hf_token": ("secret", "secret"),
    "endpoint": ("http://127.0.0.1:1", "http://127.0.0.1:1"),
    "local_files_only": ("true", True),
    "dummy_weights": ("1", True),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "max_model_len": ("2048", 2048),
    "max_num_seqs": ("8", 8),
    "max_num_batched_tokens": ("512", 512),
    "block_size": ("32", 32),
    "num_kv_blocks": ("99", 99),
    "kv_cache_memory_bytes": ("1048576", 1048576),
    "gpu_memory_utilization": ("0.5", 0.5),
    "enable_prefix_caching": ("No", False),
    "max_cached_tokens": ("0", 0),
    "async_scheduling": ("yes", True),
    "tensor_parallel_size": ("2", 2),
    "attention_backend": ("flash_attention_2, TRITON_ATTN", "flash-attn,triton"),
    "enforce_eager": ("TRUE", True),
    "max_cudagraph_capture_size": ("0", 0),
    "compile_model": ("yes", True),
    "kv_cache_dtype": ("int8", "int8"),
    "quantization": ("int4-g64", "int4-g64"),
    "deterministic": ("1", True),
    "disable_cascade_attn": ("yes", True),
    "cpu_threads": ("3", 3),
    "cpu_isa": ("avx2", "avx2"),
    "seed": (" 7 ", 7),
    "enable_lora": ("true", True),
    "max_loras": ("4", 4),
    "max_lora_rank": ("64", 64),
    "lora_enable_lm": ("false", False),
    "lora_enable_dit": ("false", False),
    "lora_enable_proj": ("true", True),
    "lora_target_modules_lm": ("q_proj, up_proj", ["q_proj", "up_proj"]),
    "lora_target_modules_dit": ("v_proj", ["v_proj"]),
    "lora_target_proj_modules": ("enc_to_lm_proj", ["enc_to_lm_proj"]),
}
"""A value of each option as the environment writes it, and as it is read."""
POOL_VALUES: dict[str, tuple[str, Any]] = {
    "devices": ("0, 1", [0, 1]),
    "replicas": ("2", 2),
    "dispatch_policy": ("rr", "rr"),
    "max_inflight_total": ("8", 8),
    "max_inflight_per_engine": ("4", 4),
    "queue_timeout": ("1.5", 1.5),
    "max_num_queued_reqs": ("0", 0),
    "max_num_queued_tokens": ("1000", 1000),
    "queue_coalesce_ms": ("0", 0.0),
    "step_timeout": ("10", 10.0),
    "max_unread_seconds": ("10", 10.0),
    "unread_timeout": ("10", 10.0),
    "adaptive_max_new_tokens": ("1", True),
    "adaptive_max_inflight_threshold": ("3", 3),
    "adaptive_max_new_tokens_factor": ("0.5", 0.5),
    "metric_window": ("10", 10),
    "warm_prefixes": ("a||b", "a||b"),
}
SERVER_VALUES: dict[str, tuple[str, Any]] = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("80", 80),
    "uds": ("/run/socket", "/run/socket"),
    "ssl_keyfile": ("key.pem", "key.pem"),
    "ssl_certfile": ("cert.pem", "cert.pem"),
    "root_path": ("/llm", "/llm"),
    "served_model_name": ("a,b", ["a", "b"]),
    "api_key": ("secret", ["secret"]),
    "admin_key": ("secret", "secret"),
    "lora_dir": ("/adapters", "/adapters"),
    "lora_modules": ("a=/adapters/a, b=org/b", ["a=/adapters/a", "b=org/b"]),
    "allowed_origins": ("https://a.example", ["https://a.example"]),
    "default_chat_template_kwargs": ('{"enable_thinking": false}', '{"enable_thinking": false}'),
    "chat_template_kwarg_names": ("enable_thinking", ["enable_thinking"]),
    "tool_call_parser": ("hermes", "hermes"),
    "reasoning_parser": ("qwen3", "qwen3"),
    "enable_auto_tool_choice": ("1", True),
    "max_body_size": ("1000", 1000),
    "max_audio_body_size": ("2000", 2000),
    "max_headers": ("10", 10),
    "max_header_size": ("1000", 1000),
    "request_timeout": ("5", 5.0),
    "keep_alive_timeout": ("1", 1.0),
    "max_n": ("4", 4),
    "max_prompts": ("4", 4),
    "max_stop_strings": ("4", 4),
    "max_stored_bytes": ("0", 0),
    "sse_keep_alive_interval": ("1", 1.0),
    "shutdown_timeout": ("0", 0.0),
    "zmq_control": ("1", True),
    "zmq_control_endpoint": ("ipc:///run/control", "ipc:///run/control"),
    "log_format": ("json", "json"),
    "log_level": ("INFO", "info"),
    "access_log": ("1", True),
}
SPEECH_VALUES: dict[str, tuple[str, Any]] = {
    "inference_timesteps": ("6", 6),
    "voices": ("/voices", "/voices"),
    "default_voice": ("ann", "ann"),
    "mp3_bitrate_kbps": ("128", 128),
    "mp3_quality": ("0", 0),
}
BESIDE_VALUES: dict[str, tuple[str, Any]] = {
    "speech_model": ("some/speaker", "some/speaker"),
    "speech_served_model_name": ("a,b", ["a", "b"]),
    "speech_devices": ("0, 1", [0, 1]),
    "speech_dtype": ("float32", "float32"),
    "speech_quantization": ("int8", "int8"),
    "speech_max_model_len": ("512", 512),
    "speech_max_num_seqs": ("4", 4),
    "speech_max_num_batched_tokens": ("64", 64),
    "speech_gpu_memory_utilization": ("0.4", 0.4),
    "speech_cpu_threads": ("2", 2),
}
"""Of a speech model beside a text model, which has to be named."""
OTHERS = [(PoolConfig, name, *value) for name, value in POOL_VALUES.items()] + [
    (config, name, *value)
    for config, values in ((ServerConfig, SERVER_VALUES), (SpeechConfig, SPEECH_VALUES))
    for name, value in values.items()
]


def test_every_default() -> None:
    config = EngineConfig()
    assert {f.name: getattr(config, f.name) for f in fields(config)} == DEFAULTS


@pytest.mark.parametrize("option", DEFAULTS)
def test_every_option_is_read_from_the_environment(option: str) -> None:
    text, value = VALUES[option]
    for variable in (f"NANOVLLM_{option.upper()}", f"NANOVLLM_SERVERPOOL_{option.upper()}"):
        config = EngineConfig.from_env({variable: text})
        assert config == EngineConfig(**{option: value})


@pytest.mark.parametrize(("variable", "option"), EngineConfig.environment_aliases.items())
def test_every_variable_of_the_family(variable: str, option: str) -> None:
    text, value = VALUES[option]
    assert getattr(EngineConfig.from_env({variable: text}), option) == value


@pytest.mark.parametrize(
    ("environ", "option", "value"),
    [
        ({"ENABLE_FLASH_ATTENTION": "0"}, "attention_backend", "sdpa"),
        ({"ENABLE_FLASH_ATTENTION": "1"}, "attention_backend", "auto"),
        ({"ENABLE_FLASH_ATTENTION": "0", "ATTN_IMPL": "fa3"}, "attention_backend", "flash-attn"),
        ({"ENABLE_CUDA_GRAPH": "0"}, "enforce_eager", True),
        ({"ENABLE_CUDA_GRAPH": "true"}, "enforce_eager", False),
        ({"ENABLE_DECODE_CUDA_GRAPH": "no"}, "enforce_eager", True),
        ({"ENABLE_CUDA_GRAPH": "1", "NANOVLLM_ENFORCE_EAGER": "1"}, "enforce_eager", True),
        ({"MINISGL_DISABLE_OVERLAP_SCHEDULING": "1"}, "async_scheduling", False),
        ({"MINISGL_DISABLE_OVERLAP_SCHEDULING": "0"}, "async_scheduling", None),
        ({"NANOVLLM_DISABLE_OVERLAP_SCHEDULING": "yes"}, "async_scheduling", False),
    ],
)
def test_variables_that_are_on_or_off(environ: dict[str, str], option: str, value: Any) -> None:
    assert getattr(EngineConfig.from_env(environ), option) == value


@pytest.mark.parametrize("variable", EngineConfig.environment_switches)
def test_variables_that_are_neither_on_nor_off(variable: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{variable}='some' is not a valid bool"):
        EngineConfig.from_env({variable: "some"})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((name, name) for name in ATTENTION_BACKENDS),
        ("FLASH_ATTN", "flash-attn"),
        ("FLASH_ATTN_VLLM_V1", "flash-attn"),
        ("flash_attention_2", "flash-attn"),
        ("fa", "flash-attn"),
        ("FLASHINFER", "flashinfer"),
        ("TRITON_ATTN", "triton"),
        ("TORCH_SDPA", "sdpa"),
        ("eager", "sdpa"),
        ("fa,fi", "flash-attn,flashinfer"),
        (" Flash-Attn , triton ", "flash-attn,triton"),
        ("fa3,FLASH_ATTN", "flash-attn"),
    ],
)
def test_names_of_attention_backends(given: str, name: str) -> None:
    config = EngineConfig(attention_backend=given)
    assert config.attention_backend == name
    assert replace(config, seed=1).attention_backend == name


@pytest.mark.parametrize(("config", "option", "text", "value"), OTHERS)
def test_every_option_of_pool_and_server_is_read_from_the_environment(
    config: type[Options], option: str, text: str, value: Any
) -> None:
    aliases = [name for name, target in config.environment_aliases.items() if target == option]
    for variable in (f"NANOVLLM_{option.upper()}", *aliases):
        assert getattr(config.from_env({variable: text}), option) == value


def test_the_options_of_a_speech_model_beside_another() -> None:
    environ = {f"NANOVLLM_{name.upper()}": text for name, (text, _) in BESIDE_VALUES.items()}
    speech = SpeechConfig.from_env(environ)
    assert {name: getattr(speech, name) for name in BESIDE_VALUES} == {
        name: value for name, (_, value) in BESIDE_VALUES.items()
    }
    base = EngineConfig(model="writer", device="cpu", max_num_seqs=9, quantization="int4")
    engine = speech.engine(base)
    assert (engine.model, engine.device, engine.quantization) == ("some/speaker", "cpu", "int8")
    assert (engine.max_model_len, engine.max_num_seqs, engine.cpu_threads) == (512, 4, 2)
    plain = SpeechConfig(speech_model="some/speaker").engine(base)
    assert (plain.device, plain.max_num_seqs, plain.quantization) == ("cpu", None, None)
    pool = speech.pool(PoolConfig(replicas=3, step_timeout=9, warm_prefixes="a"))
    assert (pool.devices, pool.replicas, pool.step_timeout) == ([0, 1], 1, 9)
    assert pool.warm_prefixes is None


def test_all_options_of_pool_and_server_have_a_value_above() -> None:
    assert SpeechConfig.names() == [*BESIDE_VALUES, *SPEECH_VALUES]
    assert PoolConfig.names() == list(POOL_VALUES)
    assert ServerConfig.names() == list(SERVER_VALUES)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PoolConfig, {"replicas": 0}, "replicas must be at least 1, got 0"),
        (PoolConfig, {"devices": [0, 1], "replicas": 3}, "leave replicas=3 out"),
        (PoolConfig, {"queue_coalesce_ms": 51}, r"queue_coalesce_ms must be in \[0, 50\]"),
        (PoolConfig, {"devices": [0, 0]}, "devices must be different device numbers"),
        (ServerConfig, {"port": 70000}, r"port must be in \[0, 65535\], got 70000"),
        (ServerConfig, {"max_prompts": 0}, r"max_prompts must be in \[1, 16384\], got 0"),
        (ServerConfig, {"max_prompts": 16385}, r"max_prompts must be in \[1, 16384\], got 16385"),
        (ServerConfig, {"log_level": "loud"}, "log_level must be one of debug, info"),
        (ServerConfig, {"api_key": [""]}, "api_key must not be empty"),
        (ServerConfig, {"admin_key": ""}, "admin_key must not be empty"),
        (SpeechConfig, {"inference_timesteps": 1}, r"inference_timesteps must be in \[2, 100\]"),
        (SpeechConfig, {"mp3_bitrate_kbps": 8}, r"mp3_bitrate_kbps must be in \[32, 320\]"),
        (SpeechConfig, {"speech_devices": [0]}, "give speech_model, or devices"),
        (
            ServerConfig,
            {"default_chat_template_kwargs": "[]"},
            "must be a JSON object, got '\\[\\]'",
        ),
        (ServerConfig, {"default_chat_template_kwargs": "{"}, "must be a JSON object"),
    ],
)
def test_values_of_pool_and_server_out_of_range_are_refused(
    config: type[Options], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        config.from_options(**options)


def test_a_server_allows_no_more_prompts_than_a_request_can_have() -> None:
    assert ServerConfig(max_prompts=MAX_PROMPTS).max_prompts == MAX_PROMPTS
    with pytest.raises(InvalidRequestError):
        ServerConfig(max_prompts=MAX_PROMPTS + 1)


def test_a_key_does_not_show_where_a_config_is_printed() -> None:
    assert "secret" not in repr(ServerConfig(api_key=["secret"], admin_key="secret"))


def test_our_own_variable_wins_over_the_family_s() -> None:
    environ = {"MODEL_NAME": "theirs", "NANOVLLM_MODEL": "ours", "NANO_VLLM_MODEL_PATH": "theirs"}
    assert EngineConfig.from_env(environ).model == "ours"


def test_empty_variables_count_as_unset() -> None:
    assert EngineConfig.from_env({"NANOVLLM_MAX_NUM_SEQS": "", "MODEL_NAME": "  "}) == (
        EngineConfig()
    )


@pytest.mark.parametrize(
    ("variable", "text", "kind"),
    [
        ("NANOVLLM_MAX_NUM_SEQS", "many", "int"),
        ("NANOVLLM_GPU_MEMORY_UTILIZATION", "half", "float"),
        ("NANOVLLM_ENFORCE_EAGER", "maybe", "bool"),
    ],
)
def test_unreadable_variables_are_named(variable: str, text: str, kind: str) -> None:
    message = f"environment variable {variable}={text!r} is not a valid {kind}"
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig.from_env({variable: text})
    assert str(caught.value) == message


@pytest.mark.parametrize("variable", EngineConfig.removed_variables)
def test_variables_that_the_family_gave_up_are_not_passed_over(variable: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{variable} is no longer supported: set NANO"):
        EngineConfig.from_env({variable: "hub://adapter"})
    assert EngineConfig.from_env({variable: ""}) == EngineConfig()


@pytest.mark.parametrize(("alias", "option"), ALIASES.items())
def test_every_alias(alias: str, option: str) -> None:
    value = (VALUES | POOL_VALUES | SERVER_VALUES)[option][1]
    configs = split_options({alias: value}, EngineConfig, PoolConfig)
    assert configs == split_options({option: value}, EngineConfig, PoolConfig)
    assert configs != [EngineConfig(), PoolConfig()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max_num_sequences", "unknown option 'max_num_sequences'; did you mean 'max_num_seqs'?"),
        ("num_kvcache_block", "unknown option 'num_kvcache_block'; did you mean "),
        ("gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'?"),
        ("zzz", "unknown option 'zzz'"),
    ],
)
def test_unknown_options_are_told_the_nearest_name(given: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig.from_options(**{given: 1})
    assert message in str(caught.value)
    assert caught.value.param == given


def test_an_option_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="option 'block_size' is given twice"):
        EngineConfig.from_options(block_size=16, kvcache_block_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        (
            {"dtype": "int8"},
            "dtype must be one of auto, float32, float16, bfloat16, half, fp16, bf16, float, fp32, "
            "got 'int8'",
        ),
        (
            {"model_source": "disk"},
            "model_source must be one of huggingface, modelscope, got 'disk'",
        ),
        ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens must be at least 1, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_kv_blocks": 0}, "num_kv_blocks must be at least 1, got 0"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1, got 0"),
        ({"max_cached_tokens": -1}, "max_cached_tokens must be at least 0, got -1"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be in (0, 1], got 0.0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be in (0, 1], got 1.1"),
        ({"tensor_parallel_size": 9}, "tensor_parallel_size must be in [1, 8], got 9"),
        (
            {"max_num_batched_tokens": 4, "max_num_seqs": 8},
            "max_num_batched_tokens=4 must be at least max_num_seqs=8, one position for each "
            "running sequence",
        ),
        ({"max_loras": 0}, "max_loras must be at least 1, got 0"),
        (
            {"max_cudagraph_capture_size": -1},
            "max_cudagraph_capture_size must be at least 0, got -1",
        ),
        (
            {"attention_backend": "xformers"},
            "attention_backend must be one of auto, triton, flash-attn, flashinfer, sdpa, cpu, or "
            "two as 'PREFILL,DECODE', got 'xformers'",
        ),
        (
            {"attention_backend": "fa,trtllm"},
            "attention_backend 'trtllm' is not supported; 'flashinfer' is nearest to it",
        ),
        (
            {"attention_backend": "fa,fi,sdpa"},
            "attention_backend must be one backend, or two as 'PREFILL,DECODE', got 'fa,fi,sdpa'",
        ),
        (
            {"attention_backend": "auto,sdpa"},
            "attention_backend 'auto,sdpa' pairs what stands alone: 'auto' and 'cpu' make no pairs",
        ),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(**options)
    assert str(caught.value) == message


def test_device_defaults() -> None:
    cpu, cuda = (EngineConfig().resolved_for(device) for device in ("cpu", "cuda"))
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens) == (64, 1024)
    assert (cuda.max_num_seqs, cuda.max_num_batched_tokens) == (256, 8192)
    assert EngineConfig().resolved_for("cuda", 256).block_size == 256
    assert EngineConfig(block_size=32).resolved_for("cuda", 256).block_size == 32
    assert (cpu.block_size, cpu.async_scheduling, cuda.async_scheduling) == (16, False, True)


def test_one_budget_follows_the_other() -> None:
    many = EngineConfig(max_num_seqs=5000).resolved_for("cpu")
    assert (many.max_num_seqs, many.max_num_batched_tokens) == (5000, 5000)
    few = EngineConfig(max_num_batched_tokens=32).resolved_for("cuda")
    assert (few.max_num_seqs, few.max_num_batched_tokens) == (32, 32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("half", "float16"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("float", "float32"),
        ("fp32", "float32"),
        ("auto", "auto"),
    ],
)
def test_other_names_of_types(name: Any, dtype: str) -> None:
    assert EngineConfig(dtype=name).dtype == dtype
