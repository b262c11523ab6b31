"""`python -m nanovllm` is the `nanovllm` command.

Little is imported here, so that Ctrl-C is heard of from the first moment on.
"""

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: As `nanovllm.cli.main`, with 130 also for Ctrl-C while that is imported.
    """
    open_standard_files()
    try:
        from nanovllm.cli import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


def open_standard_files() -> None:
    """Put `os.devnull` where standard input, output or error is closed, as after `<&-`.

    What is opened next would get its number otherwise, and be taken for it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    main()
