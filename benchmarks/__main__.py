"""All benchmarks except the study, sequentially, each in its own process.

python -m benchmarks           # for two CPU cores
python -m benchmarks --full    # for a GPU
"""

import argparse
import subprocess
import sys
import time

NAMES = ("update", "refresh", "estimate", "devices", "tracing")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Run all benchmarks.")
    parser.add_argument(
        "--full", action="store_true", help="use the configurations for a GPU"
    )
    size = ["--full"] if parser.parse_args().full else []
    begin = time.monotonic()
    for name in NAMES:
        print(f"\n==> benchmarks.{name}\n", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *size], check=True)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    print(f"\nAll: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
