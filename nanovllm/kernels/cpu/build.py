"""Compiles the kernels for this processor at first use, and keeps the result."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovllm.errors import InvalidRequestError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-pthread")
COMPILERS = ("g++", "clang++", "c++")
ROOM = 64 << 20
"""Bytes that must be free where the kernels are compiled: a full disk looks like a bad compiler."""


class NoCompilerError(RuntimeError):
    """There is no compiler, or it cannot compile the kernels."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What the kernels may use of a processor.

    Args:
        name: As `cpu_isa` names it.
        needed: Flags of `/proc/cpuinfo` without which it is not offered.
        optional: More flags that are used where present.
        defines: Further arguments for the compiler.
    """

    name: str
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_AMX = (*_AVX512, "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")

INSTRUCTION_SETS = (
    InstructionSet("amx", _AMX),
    InstructionSet("avx512", _AVX512, ("avx512_bf16", "avx512_vnni")),
    InstructionSet("avx2", _AVX2, ("avx_vnni",)),
    InstructionSet("portable", optional=("bf16", "i8mm")),
    # For tests on machines without AMX: its tiles in plain C++, hundreds of times slower. At -O3 it
    # would take twice as long to compile.
    InstructionSet("amx-emulated", defines=("-DNANOVLLM_EMULATE_AMX", "-O2")),
)
"""The best first."""

_COMPILER_NAMES = {"avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni", "avx_vnni": "avxvnni"}


def processor_flags() -> frozenset[str]:
    """Instruction-set extensions of this processor, as Linux names them."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        features = {"bf16": "FEAT_BF16", "i8mm": "FEAT_I8MM"}
        return frozenset(flag for flag, key in features.items() if _sysctl(key))
    return frozenset()


def _sysctl(feature: str) -> bool:
    command = ["sysctl", "-n", f"hw.optional.arm.{feature}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "1"


def choose_instruction_sets(wanted: str) -> list[InstructionSet]:
    """The sets to try, best first: one by its name, or all that the processor has for "auto".

    Raises:
        InvalidRequestError: The processor does not have the set that is wanted.
    """
    flags = processor_flags()
    present = [isa for isa in INSTRUCTION_SETS if flags.issuperset(isa.needed)]
    if wanted == "auto":
        return [isa for isa in present if not isa.defines]
    chosen = [isa for isa in present if isa.name == wanted]
    if not chosen:
        names = ", ".join(isa.name for isa in present)
        raise InvalidRequestError(
            f"cpu_isa {wanted!r} is not available on this processor; available: {names}", "cpu_isa"
        )
    return chosen


def compile_kernels(isa: InstructionSet, extra_flags: Sequence[str] = ()) -> Path:
    """Return the path of the library for an instruction set, compiling it if need be.

    Raises:
        NoCompilerError: There is no compiler, or all fail: the reason of the first.
    """
    problem: NoCompilerError | None = None
    for compiler in filter(None, map(shutil.which, COMPILERS)):
        try:
            return _compiled_by(compiler, isa, extra_flags)
        except NoCompilerError as e:
            problem = problem or e
    raise problem or NoCompilerError(f"none of {', '.join(COMPILERS)} is installed")


def _compiled_by(compiler: str, isa: InstructionSet, extra_flags: Sequence[str]) -> Path:
    """The library that one compiler makes, kept under a digest of all that goes into it."""
    flags = [*FLAGS, *_machine_flags(isa), *isa.defines, *extra_flags]
    sources = sorted(SOURCES.glob("*.cpp"))
    version = _run([compiler, "--version"])
    digest = hashlib.sha256("\0".join([version, *flags]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    name = f"{isa.name}-{digest.hexdigest()[:16]}"
    try:
        if library := _kept(private_cache("kernels"), name):
            return library
        directory = private_cache("kernels", ROOM)
    except OSError as e:
        raise NoCompilerError(f"there is no place for the compiled kernels: {e}") from e
    with _locked(directory):
        library = _kept(directory, name)
        if library is None:
            logger.info("compiling the CPU kernels for %s (once, some seconds)", isa.name)
            library = _compile(compiler, flags, sources, directory, name)
    return library


def _kept(directory: Path, name: str) -> Path | None:
    """The library of an earlier start, unless it is damaged: to run it would end the process."""
    for path in directory.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_content_digest(path)}":
            return path
    return None


def _content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold other processes off: one compiles, and those that start with it wait for its result."""
    with contextlib.ExitStack() as cleanup:
        # No locks here, as for a directory on NFS: each compiles its own.
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            cleanup.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # A process forked meanwhile has a copy of the descriptor, and would keep the lock.
            cleanup.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
        yield


def _compile(
    compiler: str, flags: list[str], sources: list[Path], directory: Path, name: str
) -> Path:
    """Compile the sources side by side, link them, and move the result into its place.

    Returns:
        The library, whose name ends in a digest of its content.
    """
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(source), "-o", out],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, out in zip(sources, objects, strict=True)
        ]
        errors = [job.communicate()[1] for job in jobs]
        for source, job, error in zip(sources, jobs, errors, strict=True):
            if job.returncode:
                raise NoCompilerError(f"{compiler} cannot compile {source.name}: {error[-2000:]}")
        linked = Path(scratch) / "linked.so"
        _run([compiler, *flags, "-shared", *objects, "-o", str(linked)])
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        # Atomic: where there are no locks, another process may be doing the same.
        return linked.replace(directory / f"{name}-{_content_digest(linked)}.so")


def private_cache(name: str, room: int = 0) -> Path:
    """A directory for what we compute once, that only this user may write.

    Without a usable home directory it lasts as long as the machine's temporary files.

    Args:
        name: What is kept there.
        room: Bytes that must be free.

    Raises:
        OSError: There is no such directory.
    """
    # The "~" stays where there is no home, as for a user that the system does not know.
    for root in (Path(os.path.expanduser("~/.cache")), Path(tempfile.gettempdir())):
        directory = root / f"nanovllm-{os.getuid()}" / name
        if not directory.is_absolute():
            continue
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.parent.stat()
            if status.st_uid == os.getuid():
                directory.parent.chmod(0o700)
                if os.access(directory, os.W_OK) and _has_room(directory, room):
                    return directory
        except OSError:
            continue
    if not _has_room(Path(tempfile.gettempdir()), room):
        raise OSError(errno.ENOSPC, f"less than {room >> 20} MiB are free", tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=f"nanovllm-{name}-"))


def _has_room(directory: Path, room: int) -> bool:
    return shutil.disk_usage(directory).free >= room


def _machine_flags(isa: InstructionSet) -> list[str]:
    flags = processor_flags()
    used = [*isa.needed, *(flag for flag in isa.optional if flag in flags)]
    if platform.machine() in ("aarch64", "arm64"):
        extensions = "".join(f"+{flag}" for flag in used)
        return [f"-march=armv8.2-a{extensions}"] if used else []
    return ["-m" + _COMPILER_NAMES.get(flag, flag.replace("_", "-")) for flag in used]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise NoCompilerError(f"{command[0]} cannot be run: {e}") from e
    if done.returncode:
        raise NoCompilerError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout
