"""Count a program's operations on paper, from its jaxpr: no compiler, no device.

A compiler's own count takes the body of a loop once. This one multiplies it by the trips,
and holds for sizes that fit on no machine here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Operations of one call of `fn(*args)`; the arguments may be shapes and dtypes.

    Two for each multiplication of a matrix product, one for each entry of the result of
    anything else; none for what no result depends on, which a compiler drops. Of the
    branches of a `cond` the dearest counts, and the body of a `while` counts once.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(needed)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    results = sum(float(math.prod(_shape(v))) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = _shape(equation.invars[0])
        return 2 * results * math.prod(lhs[dimension] for dimension in contracted)
    inner = [_of_jaxpr(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in _jaxprs_of(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if inner else results


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())  # a token has none


def _jaxprs_of(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else [value]
        found += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found
