"""Every benchmark of time in a short form, one after another: ``make bench``.

    python benchmarks/suite.py               # under ten minutes, planted data
    python benchmarks/suite.py --out runs/bench

A first look at this machine. For figures to quote run the scripts themselves, with their defaults, on a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
SHORT = {
    "kernels": ["kernels.py", "--outputs", "100000", "--points", "30000", "--warm-steps", "50", "--rounds", "2"],
    "step": ["training_step.py", "--problem", "planted", "--outputs", "100000", "--points", "30000", "--competitors",
             "all", "--rounds", "1", "--dense-steps", "1", "--sparse-steps", "50"],
    "scaling": ["scaling.py", "--outputs", "30000", "300000", "--points", "30000", "--warm-steps", "50", "--steps",
                "100", "--rounds", "1", "--dense-steps", "2"],
    "threads": ["scaling.py", "--outputs", "300000", "--thread-counts", "1", "2", "--points", "30000", "--warm-steps",
                "50", "--steps", "100", "--rounds", "1", "--dense-steps", "0"],
    "slide-shape": ["per_sample.py", "--rounds", "1"],
}  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the JSON files")
    options.add_argument("--only", nargs="+", choices=list(SHORT), default=list(SHORT))
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only:
        script, *rest = SHORT[name]
        print(f"\n=== {script} {' '.join(rest)}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, str(FOLDER / script), *rest, "--json", str(arguments.out / f"{name}.json")]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        print(f"({time.perf_counter() - started:.0f} s)")
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
