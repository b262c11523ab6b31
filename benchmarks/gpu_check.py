"""Checks and measures the engine on a GPU, all of it in under ten minutes.

python benchmarks/gpu_check.py --json gpu.json
python benchmarks/gpu_check.py --sections kernels,decode --markdown
python benchmarks/gpu_check.py --device cpu --tiny

It needs torch, triton and transformers, and neither weights nor a network. Each section runs in a
process of its own, so that one that fails or hangs, or an illegal access that spoils the device for
its process, takes no other along. The exit status is 1 if a test of the section `correctness`
failed, or if that section did not end. `docs/gpu.md` has more.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A clone is enough: machines with a GPU are often lent with torch and little else.
sys.path.insert(0, str(ROOT))

from gpu.figures import (  # noqa: E402
    FAILED,
    Figure,
    Recorder,
    as_markdown,
    as_table,
    read_figures,
)

SECTIONS = {
    "environment": 15,
    "correctness": 150,
    "kernels": 40,
    "decode": 80,
    "offline": 75,
    "arrivals": 40,
    "speech": 60,
    "startup": 80,
}
"""What each may take of a budget of 540 seconds; what one leaves, the next ones may use."""


def run_all(args: argparse.Namespace) -> list[Figure]:
    """Run the sections one after the other, each while there is time."""
    deadline = time.monotonic() + args.budget
    scale = args.budget / sum(SECTIONS.values())
    with tempfile.TemporaryDirectory(prefix="nanovllm-gpu-") as directory:
        path = Path(directory, "figures")
        for index, section in enumerate(args.sections):
            later = sum(SECTIONS[name] for name in args.sections[index + 1 :])
            limit = deadline - time.monotonic() - scale * later
            start = time.monotonic()
            failure = _run_process(args, section, path, limit)
            if failure is not None:
                Recorder(path, section)("section", FAILED, note=failure)
            seconds = time.monotonic() - start
            sys.stderr.write(f"{section}: {seconds:.0f} s{', ' + failure if failure else ''}\n")
        return read_figures(path)


def _run_process(args: argparse.Namespace, section: str, path: Path, limit: float) -> str | None:
    """Run a section in a process of its own; returns why it did not end well, if it did not."""
    command = [sys.executable, __file__, "--run", section, "--figures", str(path)]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    limit = max(1.0, limit)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--limit", str(limit)], stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            # What it has started would go on and disturb the next section.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        said = errors.read().strip()
    return f"ended with {status}: {' '.join(said.splitlines()[-1:])[-300:]}" if status else None


def run_section(section: str, device: str, tiny: bool, path: Path, limit: float) -> None:
    """Run one section here, which will be stopped after so many seconds."""
    import torch
    from gpu.world import World

    with tempfile.TemporaryDirectory(prefix="nanovllm-gpu-") as directory:
        recorder = Recorder(path, section)
        world = World(torch.device(device), tiny, Path(directory), recorder, limit)
        with recorder.guard("section"):
            import_module(f"gpu.{section}").run(world)


def is_correct(figures: list[Figure], sections: list[str]) -> bool:
    """Whether the section that tests was run to its end and found nothing, if it was asked for."""
    found = [figure.value for figure in figures if figure.section == "correctness"]
    return "correctness" not in sections or (bool(found) and FAILED not in found)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print rows for the documentation")
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toys, to see that everything runs")
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sections = args.sections.split(",") if args.sections else list(SECTIONS)
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return args


def main() -> None:
    args = _parse_arguments()
    if args.run:
        run_section(args.run, args.device, args.tiny, args.figures, args.limit)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    figures = run_all(args)
    is_judged = args.device == "cuda" and not args.tiny
    show = as_markdown if args.markdown else as_table
    sys.stdout.write(show(figures, is_judged) + "\n")
    if args.json:
        settings = {name: getattr(args, name) for name in ("device", "tiny", "budget", "sections")}
        result = {
            "settings": settings,
            "figures": [figure.to_dict(is_judged) for figure in figures],
        }
        args.json.write_text(json.dumps(result, indent=1))
    sys.exit(0 if is_correct(figures, args.sections) else 1)


if __name__ == "__main__":
    main()
