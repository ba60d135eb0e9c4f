"""All the benchmarks, one after another, each in a process of its own.

python -m benchmarks           # at a size for two CPU cores
python -m benchmarks --full    # at the size for a GPU
"""

import subprocess
import sys
import time

NAMES = ("update", "refresh", "estimate", "sampling", "scaling", "precision")


def main() -> None:
    begin = time.monotonic()
    for name in NAMES:
        print(f"\n==> benchmarks.{name}\n", flush=True)
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True
        )
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    print(f"\nall: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
