"""Count a program's operations on paper, from its jaxpr: no compiler, no device.

A compiler's own count takes the body of a loop once. This one multiplies it by the trips,
and holds for sizes that fit on no machine here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Operations of one call of `fn(*args)`; the arguments may be shapes and dtypes.

    Two for each multiplication of a matrix product, one for each entry of the result of
    anything else. Of the branches of a `cond` the dearest counts.
    """
    return _of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    [*outputs] = [v.aval for v in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval
        return 2.0 * outputs[0].size * math.prod(lhs.shape[d] for d in contracted)
    if name == "while":
        raise NotImplementedError("The number of trips of a `while` is not known.")
    inner = [_of_jaxpr(getattr(j, "jaxpr", j)) for j in _jaxprs_of(params)]
    if name == "cond":
        return max(inner)
    if inner:
        return params.get("length", 1) * sum(inner)
    return float(sum(math.prod(getattr(x, "shape", ())) for x in outputs))


def _jaxprs_of(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else [value]
        found += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found
