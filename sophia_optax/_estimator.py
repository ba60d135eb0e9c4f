"""What `gnb`, `hutchinson` and `empirical_fisher` return."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A function `(params, *batch, key, ...) -> ĥ`, the mean over the batch's groups.

    Attributes:
      estimate: `estimate(first_group, params, *batch, ...)`, with the number of the first
        group, from which the groups' keys are made.
      weight: `weight(params, *batch, ...)`, how much of a mean over several batches this
        one is: shape (), float.
      groups: number of groups.
    """

    estimate: Callable[..., Any]
    weight: Callable[..., Any]
    groups: int

    def __call__(self, params: Any, *batch: Any, **kwargs: Any) -> Any:
        return self.estimate(0, params, *batch, **kwargs)
