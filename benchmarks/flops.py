"""FLOPs of a function, counted in its jaxpr without compilation.

XLA's own count includes the body of a loop only once. Here the FLOPs of a `scan`'s body are
multiplied by the number of iterations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def flops(fn: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of `fn(*args)`. Arguments may be abstract.

    A matrix product counts as two FLOPs per multiply-add, any other primitive as one FLOP
    per entry of its result. Primitives with unused results are not counted. For a `cond`
    only the most expensive branch is counted, and for a `while` only a single iteration.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_flops(needed)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    results = sum(float(math.prod(_shape(v))) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = _shape(equation.invars[0])
        return 2 * results * math.prod(lhs[dimension] for dimension in contracted)
    inner = [_jaxpr_flops(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in _jaxprs_of(params)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if inner else results


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())  # effect tokens have no shape


def _jaxprs_of(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else [value]
        found += [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found
