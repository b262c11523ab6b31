"""Compiling the kernels: once, privately, anew when something changes, and not at all."""

import ctypes
import errno
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu.build import (
    INSTRUCTION_SETS,
    InstructionSet,
    NoCompilerError,
    choose_instruction_sets,
    compile_kernels,
)
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.threads import num_usable_cores
from nanovllm.kernels.select import select_kernels
from nanovllm.kernels.torch_kernels import TorchKernels

PORTABLE = next(isa for isa in INSTRUCTION_SETS if isa.name == "portable")
CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and a source that compiles in a moment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.cpp").write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    (sources / "one.h").write_text("#define ONE 1\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    return tmp_path


@pytest.fixture
def no_library() -> Iterator[None]:
    """Forget what is loaded, before and after."""
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []
    real = build._compile

    def record(
        compiler: str, flags: list[str], sources: list[Path], directory: Path, name: str
    ) -> Path:
        done.append(real(compiler, flags, sources, directory, name))
        return done[-1]

    monkeypatch.setattr(build, "_compile", record)
    return done


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_cache_is_private(home: Path) -> None:
    previous = os.umask(0)
    try:
        library = compile_kernels(PORTABLE)
    finally:
        os.umask(previous)
    root = home / ".cache" / f"nanovllm-{os.getuid()}"
    assert library.parent == root / "kernels"
    assert mode(root) == mode(library.parent) == 0o700
    assert sorted(library.parent.iterdir()) == [library], "nothing else is left there"


def test_a_cache_that_others_may_read_is_closed(home: Path) -> None:
    root = home / ".cache" / f"nanovllm-{os.getuid()}"
    root.mkdir(parents=True, mode=0o777)
    root.chmod(0o777)
    compile_kernels(PORTABLE)
    assert mode(root) == 0o700


def test_without_a_home_the_temporary_directory_serves(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    (home / "tmp").mkdir()
    library = compile_kernels(PORTABLE)
    assert home / "tmp" in library.parents
    assert mode(library.parent.parent) == 0o700


def test_a_directory_of_somebody_else_is_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shared temporary directory anyone may have made ours first."""
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    for root in (home / ".cache", home / "tmp"):
        theirs = root / f"nanovllm-{os.getuid()}"
        theirs.mkdir(parents=True)
        os.chown(theirs, 12345, 12345)
    library = compile_kernels(PORTABLE)
    assert library.is_file()
    assert f"nanovllm-{os.getuid()}" not in library.parts
    shutil.rmtree(library.parent)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories below which no byte is free."""
    roots: list[Path] = []
    real = shutil.disk_usage

    def disk_usage(path: Path) -> object:
        usage = real(path)
        return usage._replace(free=0) if set(roots) & {path, *path.parents} else usage

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    return roots


def test_where_the_disk_is_full_the_temporary_directory_serves(
    home: Path, full: list[Path], compilations: list[Path]
) -> None:
    (home / "tmp").mkdir()
    full.append(home / ".cache")
    library = compile_kernels(PORTABLE)
    assert home / "tmp" in library.parents
    assert compile_kernels(PORTABLE) == library
    assert len(compilations) == 1


def test_what_was_compiled_is_found_on_a_full_disk(
    home: Path, full: list[Path], compilations: list[Path]
) -> None:
    library = compile_kernels(PORTABLE)
    full.append(home)
    assert compile_kernels(PORTABLE) == library
    assert len(compilations) == 1


def test_without_room_nothing_is_compiled(
    home: Path, full: list[Path], compilations: list[Path]
) -> None:
    (home / "tmp").mkdir()
    full.append(home)
    with pytest.raises(NoCompilerError, match=r"no place for the compiled kernels: .*64 MiB are"):
        compile_kernels(PORTABLE)
    assert not compilations
    assert [path.name for path in (home / "tmp").iterdir()] == [f"nanovllm-{os.getuid()}"]


def test_a_second_call_compiles_nothing(home: Path, compilations: list[Path]) -> None:
    first = compile_kernels(PORTABLE)
    assert compile_kernels(PORTABLE) == first
    assert compilations == [first]


@pytest.mark.parametrize("damage", ["empty", "cut off", "zeros at its end"])
def test_a_damaged_library_is_compiled_anew(
    home: Path, compilations: list[Path], damage: str
) -> None:
    """As a machine leaves it that stops; to call what is cut off would be a bus error."""
    library = compile_kernels(PORTABLE)
    whole = library.read_bytes()
    half = whole[: len(whole) // 2]
    library.write_bytes({"empty": b"", "cut off": half}.get(damage, half.ljust(len(whole), b"\0")))
    again = compile_kernels(PORTABLE)
    assert len(compilations) == 2
    ctypes.CDLL(str(again))
    assert compile_kernels(PORTABLE) == again
    assert len(compilations) == 2


def test_a_changed_source_header_flag_or_compiler_compiles_anew(
    home: Path, compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {compile_kernels(PORTABLE)}
    (home / "csrc" / "one.h").write_text("#define ONE 2\n")
    seen.add(compile_kernels(PORTABLE))
    (home / "csrc" / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    seen.add(compile_kernels(PORTABLE))
    seen.add(compile_kernels(PORTABLE, ["-DMORE"]))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    seen.add(compile_kernels(PORTABLE))
    assert len(seen) == len(compilations) == 5
    real = build._run
    monkeypatch.setattr(
        build, "_run", lambda command: real(command) + "!" * ("--version" in command)
    )
    assert compile_kernels(PORTABLE) not in seen


def test_one_that_fails_leaves_nothing_and_says_why(home: Path) -> None:
    (home / "csrc" / "one.h").write_text("#error not today\n")
    with pytest.raises(NoCompilerError, match=r"cannot compile one\.cpp: (?s:.)*not today"):
        compile_kernels(PORTABLE)
    directory = home / ".cache" / f"nanovllm-{os.getuid()}" / "kernels"
    assert list(directory.iterdir()) == []


def test_of_several_processes_that_start_together_one_compiles(home: Path) -> None:
    script = (
        "import logging, sys; from pathlib import Path; from nanovllm.kernels.cpu import build;"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s');"
        "build.SOURCES = Path(sys.argv[1]);"
        "print(build.compile_kernels(build.InstructionSet('portable')))"
    )
    command = [sys.executable, "-c", script, str(home / "csrc")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [job.communicate()[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    (path,) = {lines[-1] for lines in outputs}
    assert Path(path).is_file()
    assert sorted(len(lines) for lines in outputs) == [1, 1, 2], "one says that it compiles"


def test_a_file_system_without_locks_will_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    assert compile_kernels(PORTABLE).is_file()


@pytest.mark.parametrize("content", [b"#!/nonexistent\n", b"\x7fELF garbage", b"#!/bin/false\n"])
def test_behind_a_compiler_that_does_not_run_the_next_is_tried(
    home: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    working = next(filter(None, map(shutil.which, build.COMPILERS)))
    programs = home / "programs"
    programs.mkdir()
    (programs / "g++").write_bytes(content)
    (programs / "g++").chmod(0o700)
    monkeypatch.setattr("shutil.which", lambda name: str(programs / name))
    with pytest.raises(NoCompilerError, match=r"programs/g\+\+ (cannot be run|failed)"):
        compile_kernels(PORTABLE)
    (programs / "c++").symlink_to(working)
    assert compile_kernels(PORTABLE).is_file()


def test_without_a_compiler_torch_takes_over_and_says_so_once(
    home: Path,
    no_library: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NoCompilerError, match=r"none of g\+\+, clang\+\+, c\+\+ is installed"):
        compile_kernels(PORTABLE)
    with caplog.at_level(logging.WARNING):
        kernels = select_kernels(EngineConfig(), CPU, torch.float32)
    assert isinstance(kernels, TorchKernels)
    (line,) = caplog.records
    assert "none of g++, clang++, c++ is installed" in line.getMessage()
    with pytest.raises(InvalidRequestError, match="deterministic") as e:
        select_kernels(EngineConfig(deterministic=True), CPU, torch.float32)
    assert e.value.param == "deterministic"


def test_a_library_that_cannot_be_loaded_is_as_good_as_no_compiler(
    home: Path,
    no_library: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A home directory mounted `noexec`, or a system library that is missing."""
    broken = home / "broken.so"
    broken.write_text("this is no library")
    monkeypatch.setattr("nanovllm.kernels.cpu.library.compile_kernels", lambda isa: broken)
    with caplog.at_level(logging.WARNING):
        kernels = select_kernels(EngineConfig(), CPU, torch.float32)
    assert isinstance(kernels, TorchKernels)
    assert len(caplog.records) == 1


def test_torch_by_choice_and_for_other_dtypes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(
            select_kernels(EngineConfig(cpu_isa="torch"), CPU, torch.float32), TorchKernels
        )
        assert not caplog.records
        assert isinstance(select_kernels(EngineConfig(), CPU, torch.float16), TorchKernels)
        assert "float16" in caplog.text


def test_the_number_of_threads_is_that_of_the_cores_or_as_told() -> None:
    library = load_library()
    before = library.num_threads
    try:
        select_kernels(EngineConfig(cpu_threads=3), CPU, torch.float32)
        assert library.num_threads == 3
        select_kernels(EngineConfig(), CPU, torch.float32)
        assert library.num_threads == num_usable_cores()
    finally:
        library.start_threads(before)


@pytest.mark.parametrize("name", ["avx1024", "amx"])
def test_a_set_that_is_not_there_is_refused_with_those_that_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = frozenset(["avx2", "fma", "f16c"])
    monkeypatch.setattr(build, "processor_flags", lambda: flags)
    with pytest.raises(InvalidRequestError, match=r"available: avx2, portable, amx-emulated") as e:
        choose_instruction_sets(name)
    assert e.value.param == "cpu_isa"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["portable"]),
        ("avx2 fma", ["portable"]),
        ("avx2 fma f16c", ["avx2", "portable"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ["avx512", "avx2", "portable"]),
        (" ".join(build._AMX), ["amx", "avx512", "avx2", "portable"]),
    ],
)
def test_sets_by_the_flags_of_the_processor(
    flags: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation is never chosen by itself."""
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset(flags.split()))
    assert [isa.name for isa in choose_instruction_sets("auto")] == names


def test_a_compiler_that_does_not_know_the_best_set_gives_the_next_and_says_so(
    no_library: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best, *others = choose_instruction_sets("auto")
    if not others:
        pytest.skip("this processor has the portable set alone")
    real = compile_kernels

    def old_compiler(isa: InstructionSet, extra_flags: Sequence[str] = ()) -> Path:
        if isa == best:
            raise NoCompilerError(f"unrecognized option for {isa.name}")
        return real(isa, extra_flags)

    monkeypatch.setattr("nanovllm.kernels.cpu.library.compile_kernels", old_compiler)
    assert load_library().isa == others[0].name
    (line,) = caplog.records
    assert re.search(rf"on the {others[0].name} kernels.*unrecognized", line.getMessage())
    with pytest.raises(NoCompilerError, match="unrecognized"):
        load_library(best.name)


def test_every_set_of_this_processor_compiles_and_loads() -> None:
    for isa in choose_instruction_sets("auto"):
        assert load_library(isa.name).isa == isa.name
