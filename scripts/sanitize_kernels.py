"""Runs the tests of the CPU kernels on kernels that check themselves.

Memory errors and undefined behaviour by default; `--thread` looks for data races instead. The
kernels are compiled with the sanitizers of g++ for every instruction set of this processor, and the
tests run in an interpreter that has the sanitizer's library loaded before anything else.

    python scripts/sanitize_kernels.py [--thread] [pytest arguments]
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from nanovllm.kernels.cpu import build

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/unit/test_cpu_linear.py",
    "tests/unit/test_cpu_compact.py",
    "tests/unit/test_cpu_replay.py",
    "tests/unit/test_cpu_prefault.py",
    "tests/unit/test_cpu_attention.py",
    "tests/unit/test_cpu_elementwise.py",
    "tests/unit/test_cpu_audio.py",
    "tests/unit/test_mixture.py",
    "tests/unit/test_cpu_local_attention.py",
    "tests/unit/test_cpu_threads.py::test_kernels_of_several_python_threads_take_turns",
]
REPETITIVE = "may_come_in_chunks or alone_and_in_any_batch"  # long, and no path that others lack
COMMON = ("-g", "-O1", "-fno-omit-frame-pointer")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *COMMON)
THREAD = ("-fsanitize=thread", *COMMON)
RUN_TESTS = """
import sys
from nanovllm.kernels.cpu import build
build.FLAGS += tuple(sys.argv[1].split())
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--thread", action="store_true", help="look for data races")
    options, arguments = parser.parse_known_args()
    flags = THREAD if options.thread else MEMORY
    build.FLAGS = (*build.FLAGS, *flags)
    # Here, because compilers are slow under a sanitizer.
    for isa in build.INSTRUCTION_SETS:
        if build.processor_flags().issuperset(isa.needed):
            build.compile_kernels(isa)
    command = [sys.executable, "-c", RUN_TESTS, " ".join(flags)]
    # Without capture, or what a sanitizer says as it ends the process would be lost.
    command += ["-q", "-p", "no:cacheprovider", "--capture=sys"]
    command += arguments or [*TESTS, "-k", f"not ({REPETITIVE})"]
    if options.thread and shutil.which("setarch"):
        # Older versions of the race detector do not bear the randomised addresses of new kernels.
        command = ["setarch", platform.machine(), "-R", *command]
    return subprocess.run(command, cwd=ROOT, env=environment(options.thread)).returncode


def environment(thread: bool) -> dict[str, str]:
    """The variables under which an interpreter that knows nothing of sanitizers runs with one."""
    return {
        **os.environ,
        "LD_PRELOAD": preloaded("libtsan.so" if thread else "libasan.so"),
        # Python leaves its own allocations to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # What is not ours is not instrumented, and would seem to race with what is.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
        "OMP_NUM_THREADS": "1",
    }


def preloaded(library: str) -> str:
    """Paths of a sanitizer's library and of the C++ library, which it looks into."""
    names = (library, "libstdc++.so")
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return " ".join(found)


if __name__ == "__main__":
    sys.exit(main())
