"""Command that runs the benchmarks in `NAMES`, each in its own process.

python -m benchmarks           # with problem sizes for two CPU cores
python -m benchmarks --full    # with problem sizes for a GPU
"""

import argparse
import subprocess
import sys
import time

NAMES = ("update", "refresh", "estimate", "devices")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Run all benchmarks.")
    parser.add_argument("--full", action="store_true", help="use the sizes for a GPU")
    size = ["--full"] if parser.parse_args().full else []
    for name in NAMES:
        print(f"\n==> benchmarks.{name}\n", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *size], check=True)
        print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
