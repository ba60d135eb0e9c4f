"""The profile of a few steps, for TensorBoard or Perfetto."""

import contextlib
from pathlib import Path

import jax

from examples.gpt.config import Config

FIRST = 11  # the steps before compile, and fill what is to be read ahead


class Profile(contextlib.ExitStack):
    """Writes `config.profile` steps, or those that there are, to the folder `profile`."""

    def __init__(self, config: Config, folder: Path):
        super().__init__()
        self._count, self._folder = config.profile, folder / "profile"

    def step(self, step: int) -> None:
        """Before a step; `step` counts from where this process began."""
        if self._count and step == FIRST:
            self.enter_context(jax.profiler.trace(self._folder))
            # Before it stops, devices finish what was sent to them.
            self.callback(lambda: jax.block_until_ready(jax.live_arrays()))
        if step == FIRST + self._count:
            self.close()
