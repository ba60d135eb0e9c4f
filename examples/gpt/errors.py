"""What other packages raise, told as an error of a choice."""

import contextlib
from collections.abc import Iterator

from examples.gpt.config import ConfigError


@contextlib.contextmanager
def errors_as(message: str, advice: str = "") -> Iterator[None]:
    """Turns any error into a ConfigError: the message, what came, and advice."""
    try:
        yield
    except Exception as error:  # each package has kinds of its own
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{message}: {kind}{error}.{advice}") from error
