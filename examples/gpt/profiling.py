"""The profile of a few steps, for TensorBoard or Perfetto."""

from pathlib import Path

import jax

from examples.gpt.config import Config

FIRST = 11  # the steps before compile, and fill what is to be read ahead


class Profile:
    """Writes as many steps as `--profile` says to the folder `profile`."""

    def __init__(self, config: Config, folder: Path):
        self._count, self._folder = config.output.profile, folder / "profile"
        self._is_running = False

    def step(self, step: int) -> None:
        """Before a step; `step` counts from where this process began."""
        if self._count and step == FIRST:
            jax.profiler.start_trace(self._folder)
            self._is_running = True
        if step == FIRST + self._count:
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._is_running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._is_running = False
