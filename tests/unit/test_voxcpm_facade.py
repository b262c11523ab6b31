"""`VoxCPM.from_pretrained` and its pools: what programs written for nanovllm-voxcpm rely on."""

import asyncio
import gc
import inspect
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nanovllm import LoRAConfig
from nanovllm.async_voxcpm import GPU_DEFAULTS, _placed
from nanovllm.voxcpm import AsyncVoxCPMServerPool, SyncVoxCPMServerPool, VoxCPM

TEXT = "Hello world"
SMALL: dict[str, Any] = {"devices": [0], "max_num_seqs": 4, "cpu_threads": 1, "dtype": "float32"}

ASYNC_SNIPPET = """
import asyncio
import numpy as np

from nanovllm_voxcpm import VoxCPM


async def main() -> None:
    server = VoxCPM.from_pretrained(
        model="/path/to/model_dir",
        devices=[0],
        max_num_batched_tokens=8192,
        max_num_seqs=16,
        gpu_memory_utilization=0.95,
    )
    await server.wait_for_ready()

    chunks: list[np.ndarray] = []
    async for chunk in server.generate(target_text="Hello world"):
        chunks.append(chunk)  # float32 numpy array

    wav = np.concatenate(chunks, axis=0)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main())
"""
SYNC_SNIPPET = """
import numpy as np

from nanovllm_voxcpm import VoxCPM


server = VoxCPM.from_pretrained(model="/path/to/model_dir", devices=[0])
chunks = [chunk for chunk in server.generate(target_text="Hello world")]
wav = np.concatenate(chunks, axis=0)
server.stop()
"""
"""The two of the family's documentation, word for word."""


@pytest.fixture(scope="module")
def model(speech_checkpoint: Callable[..., Path]) -> Path:
    """A VoxCPM-0.5B that never stops by itself."""
    return speech_checkpoint("v1", stop_bias=-1.0)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[SyncVoxCPMServerPool]:
    with VoxCPM.from_pretrained(str(model), **SMALL) as pool:
        assert isinstance(pool, SyncVoxCPMServerPool)
        yield pool


def recording(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    times = np.arange(int(seconds * 16000)) / 16000
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 220 * times), 16000, format="WAV")
    return file.getvalue()


def say(pool: SyncVoxCPMServerPool, **options: Any) -> "np.typing.NDArray[np.float32]":
    given: dict[str, Any] = {"target_text": TEXT, "max_generate_length": 4, "seed": 1} | options
    return np.concatenate(list(pool.generate(**given)))


def num_left(pool: SyncVoxCPMServerPool) -> tuple[int, int]:
    """Requests and KV blocks in use, once the engine has said so."""
    speech = pool._pool._speech
    assert speech is not None
    for _ in range(100):
        stats = speech.stats()
        left = stats.num_inflight, stats.workers[0].engine.num_used_blocks
        if left == (0, 0):
            break
        time.sleep(0.02)
    return left


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [ASYNC_SNIPPET, SYNC_SNIPPET], ids=["async", "sync"])
def test_the_documented_snippets_run_unchanged(
    snippet: str, speech_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(snippet.replace("/path/to/model_dir", str(speech_checkpoint("v2"))))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("\n") == 1
    assert "devices=[0]: there is no CUDA device here" in run.stderr


def test_arguments_and_defaults_are_the_familys() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(VoxCPM.from_pretrained).parameters.items()
    }
    assert defaults == {
        "model": inspect.Parameter.empty,
        "inference_timesteps": 10,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 512,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": False,
        "devices": None,
        "lora_config": None,
        "kwargs": inspect.Parameter.empty,
    }
    for pool in (AsyncVoxCPMServerPool, SyncVoxCPMServerPool):
        given = {
            name: parameter.default
            for name, parameter in inspect.signature(pool.generate).parameters.items()
        }
        assert list(given)[1:11] == [
            "target_text",
            "prompt_latents",
            "prompt_text",
            "prompt_id",
            "max_generate_length",
            "temperature",
            "cfg_value",
            "ref_audio_latents",
            "lora_name",
            "seed",
        ]
        assert {"inference_timesteps", "min_len", "split_sentences"} < set(given)
        assert "Generator" in str(inspect.signature(pool.generate).return_annotation)
        assert list(given.values())[2:11] == [None, "", None, 2000, 1.0, 2.0, None, None, None]


def test_the_names_of_nanovllm_voxcpm() -> None:
    import nanovllm_voxcpm
    from nanovllm_voxcpm.llm import VoxCPM as OfModule
    from nanovllm_voxcpm.models.voxcpm.config import LoRAConfig as Config
    from nanovllm_voxcpm.models.voxcpm.server import AsyncVoxCPMServerPool as AsyncPool
    from nanovllm_voxcpm.models.voxcpm2.config import LoRAConfig as Config2
    from nanovllm_voxcpm.models.voxcpm2.server import SyncVoxCPM2ServerPool as SyncPool

    assert nanovllm_voxcpm.VoxCPM is OfModule is VoxCPM
    assert Config is Config2 is LoRAConfig
    assert AsyncPool is AsyncVoxCPMServerPool
    assert SyncPool is SyncVoxCPMServerPool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq": 3, "foo": 1}, "Unknown kwargs: foo, max_seq"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "must be at least max_num_seqs"),
        ({"inference_timesteps": 1}, r"inference_timesteps must be in \[2, 100\]"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"devices": [0, 0]}, "different device numbers"),
        ({"lora_config": {"max_loras": 2}}, r"must be a LoRAConfig, .* got dict"),
    ],
)
def test_options_that_cannot_be_used_are_told_at_once(
    model: Path, options: dict[str, Any], message: str
) -> None:
    for pool in (AsyncVoxCPMServerPool, VoxCPM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            pool(str(model), **options)


@pytest.mark.parametrize("model", [None, "", 5, b"/model"])
def test_models_that_are_none(model: Any) -> None:
    for pool in (AsyncVoxCPMServerPool, SyncVoxCPMServerPool, VoxCPM.from_pretrained):
        with pytest.raises(ValueError, match="model must be the directory of a checkpoint or the"):
            pool(model)


def test_models_that_cannot_be_used_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        AsyncVoxCPMServerPool(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        AsyncVoxCPMServerPool("~/no/such/model")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AsyncVoxCPMServerPool("/no/such/model")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "bark"}))
    with pytest.raises(ValueError, match="Unsupported model architecture: bark"):
        AsyncVoxCPMServerPool(str(tmp_path))


def test_a_checkpoint_without_weights_says_which_are_missing(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "audiovae.pth"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["base_lm.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"Missing parameters: \['base_lm\.embed_tokens\.weight'\]"
    ):
        VoxCPM.from_pretrained(str(tmp_path), **SMALL)


def test_what_is_meant_for_a_gpu_is_not_asked_of_a_cpu(model: Path) -> None:
    options: dict[str, Any] = {"model": str(model), "device": "cpu", "max_model_len": 4096}
    placed = _placed(options | GPU_DEFAULTS, [0])
    assert placed["max_num_seqs"] is placed["max_num_batched_tokens"] is None
    assert placed["max_model_len"] == 512
    assert "devices" not in placed
    chosen = _placed(options | {"max_num_seqs": 3, "max_num_batched_tokens": 99}, [0, 1])
    assert (chosen["max_num_seqs"], chosen["max_num_batched_tokens"]) == (3, 99)
    assert chosen["replicas"] == 2


def test_chunks_are_patches_and_a_seed_repeats_them(server: SyncVoxCPMServerPool) -> None:
    chunks = list(server.generate(TEXT, max_generate_length=4, seed=1))
    assert [(chunk.shape, str(chunk.dtype)) for chunk in chunks] == [((1280,), "float32")] * 4
    assert np.array_equal(np.concatenate(chunks), say(server))
    info = server.get_model_info()
    assert info["sample_rate"] == info["encoder_sample_rate"] == 16000
    assert (info["channels"], info["feat_dim"], info["patch_size"]) == (1, 16, 2)
    assert "output_sample_rate" not in info


def test_prompts_by_id_and_by_latents(server: SyncVoxCPMServerPool) -> None:
    latents = server.encode_latents(recording(), "wav")
    assert np.frombuffer(latents, np.float32).reshape(-1, info_of(server)).shape == (14, 16)
    prompt_id = server.add_prompt(recording(), "wav", "A tone.")
    assert len(prompt_id) == 32
    by_id = say(server, prompt_id=prompt_id)
    assert np.allclose(by_id, say(server, prompt_latents=latents, prompt_text="A tone."), atol=1e-5)
    server.remove_prompt(prompt_id)
    for text in ("", "  "):
        with pytest.raises(ValueError, match="wav prompt requires non-empty prompt_text"):
            server.add_prompt(recording(), "wav", text)
    with pytest.raises(ValueError, match=f"Prompt with id {prompt_id} not found"):
        server.remove_prompt(prompt_id)


def info_of(pool: SyncVoxCPMServerPool) -> int:
    feat_dim: int = pool.get_model_info()["feat_dim"]
    return feat_dim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_text": None}, "target text must be a non-empty string"),
        ({"prompt_latents": [0.5], "prompt_text": "x"}, "prompt_latents must be bytes"),
        ({"prompt_id": "x"}, "Prompt with id x not found"),
        ({"prompt_text": "x"}, "Prompt text is not allowed when prompt latents are not provided"),
        ({"prompt_latents": bytes(128)}, "Prompt text is required when prompt latents are prov"),
        ({"max_generate_length": 0}, "max_generate_length must be >= 1, got 0"),
        ({"target_text": "a b " * 2000}, "Prompt is too long for max_model_len"),
        ({"target_text": "a b c d " * 20, "max_generate_length": 2000}, "Request may exceed max_"),
        ({"ref_audio_latents": bytes(128)}, "Reference audio is not supported"),
        ({"lora_name": "x"}, "LoRA 'x' is not registered"),
        ({"temperature": -1.0}, "temperature"),
        ({"inference_timesteps": 1}, "inference_timesteps"),
    ],
)
def test_bad_requests(server: SyncVoxCPMServerPool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        say(server, **options)


def test_a_prompt_comes_one_way(server: SyncVoxCPMServerPool) -> None:
    prompt_id = server.add_prompt(recording(), "wav", "A tone.")
    with pytest.raises(ValueError, match="Prompt latents and prompt id cannot be provided at the"):
        say(server, prompt_id=prompt_id, prompt_latents=bytes(128), prompt_text="x")
    with pytest.raises(ValueError, match="Prompt text and prompt id cannot be provided at the"):
        say(server, prompt_id=prompt_id, prompt_text="x")
    server.remove_prompt(prompt_id)


def test_closing_the_generator_ends_the_request(server: SyncVoxCPMServerPool) -> None:
    left = server.generate(TEXT * 3, min_len=100)
    dropped = server.generate(TEXT * 3, min_len=100)
    assert [len(chunk) for chunk in islice(left, 2)] == [1280] * 2
    next(dropped)
    left.close()
    del dropped
    assert num_left(server) == (0, 0)


def test_many_threads_may_speak_at_once(server: SyncVoxCPMServerPool) -> None:
    said: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: said.update({i: say(server, seed=i)})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(np.allclose(said[i], say(server, seed=i), atol=1e-5) for i in range(6))


def test_a_long_text_by_sentences(server: SyncVoxCPMServerPool) -> None:
    chunks = list(
        server.generate("One. Two. Three.", max_generate_length=4, seed=1, split_sentences=True)
    )
    assert len(chunks) == 12


def test_adapters_need_room_from_the_start(server: SyncVoxCPMServerPool, tmp_path: Path) -> None:
    assert server.list_loras() == []
    with pytest.raises(ValueError, match="without LoRA"):
        server.register_lora("a", str(tmp_path))
    with pytest.raises(ValueError, match="LoRA 'a' is not registered"):
        server.unregister_lora("a")
    with pytest.raises(ValueError, match="load one first"):
        server.set_lora_enabled(True)
    assert server.reset_lora() == {"status": "ok"}


def test_adapters_by_name_and_the_single_one(model: Path, tmp_path: Path) -> None:
    from tests.lora_oracle import write_adapter

    path = str(write_adapter(model, tmp_path))
    options = SMALL | {"lora_config": LoRAConfig(max_loras=2, max_lora_rank=8)}

    async def main() -> None:
        async with VoxCPM.from_pretrained(str(model), **options) as pool:
            assert isinstance(pool, AsyncVoxCPMServerPool)

            async def speak(**options: Any) -> Any:
                stream = pool.generate(TEXT, max_generate_length=4, seed=1, **options)
                return np.concatenate([chunk async for chunk in stream])

            plain = await speak()
            assert await pool.register_lora("mine", path) == {"name": "mine"}
            with pytest.raises(ValueError, match="LoRA 'mine' is already registered"):
                await pool.register_lora("mine", path)
            assert await pool.list_loras() == [{"name": "mine"}]
            named = await speak(lora_name="mine")
            assert not np.allclose(named, plain, atol=1e-4)
            loaded = await pool.load_lora(path)
            assert loaded["status"] == "ok"
            assert loaded["loaded_keys"]
            assert np.allclose(await speak(), named, atol=1e-5)
            with pytest.raises((ValueError, FileNotFoundError)):
                await pool.load_lora(str(tmp_path / "none"))
            assert np.allclose(await speak(), named, atol=1e-5)
            await pool.load_lora(path)
            assert len(await pool.list_loras()) == 2
            assert np.allclose(await speak(), named, atol=1e-5)
            await pool.set_lora_enabled(False)
            assert np.allclose(await speak(), plain, atol=1e-5)
            assert (await pool.set_lora_enabled(True))["lora_enabled"]
            await pool.reset_lora()
            assert np.allclose(await speak(), plain, atol=1e-5)
            await pool.unregister_lora("mine")
            assert await pool.list_loras() == []

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_stopped_pool_says_so_and_a_notebook_may_have_the_sync_one(model: Path) -> None:
    async def notebook() -> SyncVoxCPMServerPool:
        return SyncVoxCPMServerPool(str(model), **SMALL)

    pool = asyncio.run(notebook())
    generator = pool.generate(TEXT, min_len=50)
    next(generator)
    pool.stop()
    pool.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        next(generator)
    with pytest.raises(RuntimeError, match="stopped"):
        pool.get_model_info()


def test_a_pool_that_is_dropped_ends_its_process_and_its_thread(model: Path) -> None:
    pool = SyncVoxCPMServerPool(str(model), **SMALL)
    generator = pool.generate(TEXT, min_len=50)
    next(generator)
    speech, thread = pool._pool._speech, pool._loop._thread
    assert speech is not None
    pid = speech.stats().workers[0].pid or 0
    del pool
    os.kill(pid, 0)  # the generator has it
    del generator, speech
    gc.collect()
    assert not thread.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_stopping_before_it_was_ready_leaves_nothing_behind(model: Path) -> None:
    async def main() -> None:
        pool = VoxCPM.from_pretrained(str(model), **SMALL)
        await pool.stop()
        with pytest.raises(RuntimeError, match="stopped"):
            await pool.wait_for_ready()

    asyncio.run(main())
