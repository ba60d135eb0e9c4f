"""Which parameters `each_group` marks, read from the jaxpr of a gradient.

The squares that a mark makes must reach their parameter as they are: moved, padded with
zeros, stacked by a scan over layers, or summed over devices, but not summed or changed in
any other way. So along the way back each value is of one of a few kinds, and `_apply`
says of what kind the results of an operation are.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from sophia_optax.curvature.each_group import DEVICE, GROUPS, SQUARES, bind


class Kind(enum.Enum):
    """What a value on the way back is, and of an error what is wrong."""

    ZERO = enum.auto()
    OTHER = enum.auto()  # such as a gradient that no mark has seen
    SUMMED = enum.auto()  # a gradient that no mark has seen, summed over devices
    SQUARES = enum.auto()  # an entry is 0, or of one entry of each group's gradient
    TWICE = (
        "it is marked at several uses, or in a loop that is not over layers, where the "
        "square is of a part of the gradient. Mark it once, before all its uses"
    )
    PARTLY = "not all its uses are marked. Mark it once, before all of them"
    CHANGED = (
        "it is changed before the mark, so that the square is of another gradient. Mark it "
        "as it is, and change it after"
    )
    CHOSEN = (
        "it is marked in a branch of a `cond`, which may differ between groups. Mark it "
        "before the `cond`"
    )
    ROUNDED = "its squares are rounded to 16 bits. Mark it in float32, and cast it after"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value's kind, and over which mapped axes it was summed."""

    kind: Kind
    axes: frozenset[str] = frozenset()

    @property
    def is_squares(self) -> bool:
        return self.kind == Kind.SQUARES


ZERO, OTHER = Seen(Kind.ZERO), Seen(Kind.OTHER)

# An operation of these passes on what its first operand is; the others are numbers.
_MOVES = {"convert_element_type", "copy", "copy_p", "dynamic_slice", "name", "pcast"}
_MOVES |= {"pvary", "reshape", "reshard", "rev", "sharding_constraint", "slice", "split"}
_MOVES |= {"squeeze", "transpose"}
_SAME_SIZE = {"broadcast_in_dim", "reduce_sum"}  # these too, where they sum up nothing
_SUMS = {"add", "add_any", "dynamic_update_slice", "pad", "scatter-add"}
_SUMS_OVER_DEVICES = {"psum", "psum_invariant", "reduce_scatter"}
_SCALES = {"div", "mul", "neg", "select_n", "sub"}


def marks_of(
    gradient: Callable[..., Any], params: Any, *args: Any, axes: tuple[str, ...]
) -> Any:
    """What is seen of each parameter on the way back of `gradient(params, *args)`.

    Args:
      gradient: function whose result is a tree like `params`.
      params: a tree of arrays.
      *args: the other arguments.
      axes: the mapped axes whose devices have groups of their own.

    Returns:
      A tree like `params` of `Seen`: squares, where it is marked.

    Raises:
      ValueError: for a parameter whose mark would give a wrong estimate, or whose gradient
        is summed over `axes` and not marked.
    """
    bound = bind(DEVICE if axes else GROUPS, gradient)
    with jax.disable_jit(False):  # which would take a scan over layers apart
        jaxpr = jax.make_jaxpr(bound)(params, *args).jaxpr
    found = _follow(jaxpr, [OTHER] * len(jaxpr.invars), frozenset(axes))
    paths, tree = jax.tree.flatten_with_path(params)
    for (path, _), seen in zip(paths, found, strict=True):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if isinstance(wrong := seen.kind.value, str):
            raise ValueError(f"`each_group` must see {name} once, whole: {wrong}.")
        if seen.kind == Kind.SUMMED:
            raise ValueError(
                f"The gradient of {name} is summed over the mapped axes "
                f"{sorted(seen.axes)} before the square. Mark it with `each_group` where "
                "the model gathers it."
            )
    return tree.unflatten(found)


def _follow(jaxpr: Any, given: Sequence[Seen], axes: frozenset[str]) -> list[Seen]:
    """What the results of a jaxpr are, if its arguments are what is given."""
    seen = dict(zip(jaxpr.invars, given, strict=True))

    def read(x):
        if isinstance(x, core.Literal):
            return ZERO if not jnp.ndim(x.val) and x.val == 0 else OTHER
        return seen.get(x, OTHER)

    for eqn in jaxpr.eqns:
        results = _apply(eqn, [read(x) for x in eqn.invars], axes)
        seen.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn: Any, given: list[Seen], axes: frozenset[str]) -> list[Seen]:
    """What the results of an operation are."""
    name, params, results = eqn.primitive.name, eqn.params, len(eqn.outvars)
    if name == "name" and params["name"] == SQUARES:
        return [Seen(Kind.SQUARES)]
    if name == "scan":
        return _scan(eqn, given, axes)
    if name == "cond":
        branches = [
            _follow(_open(branch), given[1:], axes) for branch in params["branches"]
        ]
        either = [functools.reduce(_either, each) for each in zip(*branches, strict=True)]
        return [Seen(Kind.CHOSEN) if seen.is_squares else seen for seen in either]
    inside = params.get("jaxpr", params.get("call_jaxpr"))
    if inside is not None and name != "while":
        return _follow(_open(inside), given, axes)
    if name == "optimization_barrier":
        return given

    first = given[0] if given else OTHER
    if name in _SUMS:
        total = _sum(first, given[1] if name != "scatter-add" else given[2])
        repeats = name == "scatter-add" and not params["unique_indices"]
        return [_twice(total) if repeats else total]
    if name == "concatenate":
        return [functools.reduce(_either, given)]
    if name in _SUMS_OVER_DEVICES:
        over = frozenset(params.get("axes", params.get("axis_name")))
        return [_over_devices(seen, over, axes) for seen in given]
    same_size = name in _SAME_SIZE and eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    if name in _MOVES or same_size or (first == ZERO and name in _SAME_SIZE):
        dtype = eqn.outvars[0].aval.dtype
        rounded = first.is_squares and jnp.promote_types(dtype, "float32") != dtype
        return [Seen(Kind.ROUNDED) if rounded else first] * results
    if name in _SAME_SIZE:
        return [_twice(first)]
    kinds = {seen.kind for seen in given}
    if wrong := next((seen for seen in given if isinstance(seen.kind.value, str)), None):
        return [wrong] * results
    if Kind.SQUARES in kinds:
        return [Seen(Kind.CHANGED)] * results
    if name == "mul" and Kind.ZERO in kinds:
        return [ZERO]
    if name in _SCALES and Kind.SUMMED in kinds:
        return [next(seen for seen in given if seen.kind == Kind.SUMMED)]
    return [OTHER] * results


def _scan(eqn: Any, given: list[Seen], axes: frozenset[str]) -> list[Seen]:
    body = _open(eqn.params["jaxpr"])

    def unlike(outside, inside):  # has a leading axis that the loop is over
        return sum(o.aval.ndim != i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - unlike(eqn.outvars, body.outvars)
    end = len(given) - unlike(eqn.invars, body.invars)
    start = end - carried
    while True:
        results = _follow(body, given, axes)
        carry = [_either(*both) for both in zip(given[start:end], results, strict=False)]
        if carry == given[start:end] or eqn.params["length"] == 1:
            return results
        given = [*given[:start], *carry, *given[end:]]


def _open(jaxpr: Any) -> Any:
    """Without its constants, where JAX keeps them beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _either(a: Seen, b: Seen) -> Seen:
    """What a value is that is one or the other, or has entries of both."""
    if a == b or b == ZERO:
        return a
    if a == ZERO:
        return b
    for seen in (a, b):
        if isinstance(seen.kind.value, str):
            return seen
    kinds = {a.kind, b.kind}
    if kinds == {Kind.SQUARES}:
        return Seen(Kind.TWICE)
    if Kind.SQUARES in kinds:
        return Seen(Kind.PARTLY)
    return Seen(Kind.SUMMED, a.axes | b.axes)


def _sum(a: Seen, b: Seen) -> Seen:
    return _twice(a) if a.is_squares and b.is_squares else _either(a, b)


def _twice(seen: Seen) -> Seen:
    return Seen(Kind.TWICE) if seen.is_squares else seen


def _over_devices(seen: Seen, over: frozenset[str], axes: frozenset[str]) -> Seen:
    """What a sum over mapped axes is, of which `axes` have groups of their own."""
    if seen.is_squares:
        return Seen(seen.kind, seen.axes | over) if over <= axes else _twice(seen)
    if seen.kind in (Kind.OTHER, Kind.SUMMED) and over & axes:
        return Seen(Kind.SUMMED, seen.axes | over & axes)
    return seen
