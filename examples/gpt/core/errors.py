"""The error of a choice that can't be, which a command tells in one line."""

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
    """A choice that can't be, found before anything is compiled where it can be."""

    def text(self) -> str:
        """The error and its notes, for a person."""
        return "\n".join([f"error: {self}", *getattr(self, "__notes__", [])])


def need(holds: bool, message: str) -> None:
    """Raises ConfigError with the message, unless it holds."""
    if not holds:
        raise ConfigError(message)


def need_positive(**values: float | None) -> None:
    """Raises ConfigError, by its name, for a number that is neither positive nor None."""
    for name, value in values.items():
        need(value is None or value > 0, f"`{name}` must be positive, got {value}.")


@contextlib.contextmanager
def errors_as(message: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turns errors of these kinds into a ConfigError: message, what came, advice."""
    try:
        yield
    except kinds as error:
        kind = "" if isinstance(error, ConfigError) else type(error).__name__
        what = ": ".join(filter(None, [kind, str(error).strip().rstrip(".")]))
        raise ConfigError(f"{message}: {what}. {advice}".strip()) from error
