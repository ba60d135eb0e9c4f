"""Which parameters `each_group` marks, read from the jaxpr of a gradient.

The squares that a mark makes must reach their parameter as they are: moved, padded with
zeros, stacked by a scan over layers, or summed over devices, but not summed or changed in
any other way. And no gradient may have been summed over devices before it is squared. So
each value of the jaxpr is of one of a few kinds, and `_apply` says of what kind the
results of an operation are.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from sophia_optax.curvature.each_group import SQUARES

_BEGIN = "sophia_optax.begin"  # of the way back, in a jaxpr


class Kind(enum.Enum):
    """What a value is. The text of an error says what is wrong with the parameter."""

    NUMBER = enum.auto()  # is there without a way back
    ZERO = enum.auto()
    GRADIENT = enum.auto()
    SUMMED = enum.auto()  # a gradient of several devices
    SQUARES = enum.auto()  # each entry is 0, or a sum over groups of squares of one entry
    TWICE = (
        "it is marked in parts, at several uses, or in a loop that is not over layers, so "
        "that the squares are of parts of the gradient. Mark all of it once, before it is "
        "used"
    )
    AGAIN = "it, or what is computed from it, is marked again after a mark. Mark it once"
    PARTLY = "not all its uses are marked. Mark it once, before all of them"
    CHANGED = (
        "it is changed before the mark, so that the squares are of another gradient. Mark "
        "it as it is, and change it after"
    )
    CHOSEN = (
        "it is marked in a branch of a `cond`, which may differ between groups. Mark it "
        "before the `cond`"
    )
    HIDDEN = "it is marked inside a `while` or a kernel. Mark it before"
    INNER = "it is marked in a gradient that the model takes itself. Mark it before that"
    EARLY = (
        "its gradient is summed over devices before the mark. In a `shard_map`, mark it "
        "after it is gathered; a model that exchanges anything else over `axis_name` can't "
        "be estimated so"
    )
    ROUNDED = (
        "it is cast to 16 bits before the mark, and its squares are on the way back. Mark "
        "it in float32, and cast it after"
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value's kind, and over which mapped axes it was summed."""

    kind: Kind
    axes: frozenset[str] = frozenset()

    @property
    def is_squares(self) -> bool:
        return self.kind == Kind.SQUARES

    @property
    def is_error(self) -> bool:
        return isinstance(self.kind.value, str)


NUMBER, ZERO = Seen(Kind.NUMBER), Seen(Kind.ZERO)

# The result of these is what their first operand is; others are indices or padding.
_MOVES = {"convert_element_type", "copy", "dynamic_slice", "name", "pcast", "pvary"}
_MOVES |= {"reshape", "reshard", "rev", "sharding_constraint", "slice", "split", "squeeze"}
_MOVES |= {"layout_constraint", "transpose"}
_MAY_SUM = {"broadcast_in_dim", "reduce_sum"}  # too, if the result has as many entries
_SUMS = {"add", "add_any", "dynamic_update_slice", "pad", "scatter-add"}
_VANISH = {"conv_general_dilated", "dot_general", "integer_pow", "mul", "neg", "square"}
_SUMS_OVER_DEVICES = {"psum", "psum_invariant", "reduce_scatter"}


@jax.custom_vjp
def begin(loss: jax.Array) -> jax.Array:
    """The same loss, as the one whose gradient `marks_of` follows."""
    return loss


begin.defvjp(lambda loss: (loss, None), lambda _, g: (checkpoint_name(g, _BEGIN),))


def marks_of(
    gradient: Callable[..., Any], params: Any, *args: Any, axes: tuple[str, ...]
) -> Any:
    """What is seen of each parameter on the way back of `gradient(params, *args)`.

    Args:
      gradient: function whose result is a tree like `params`, the gradient of a loss that
        `begin` returned.
      params: a tree of arrays.
      *args: the other arguments.
      axes: the mapped axes whose devices have groups of their own.

    Returns:
      A tree like `params` of `Seen`: squares, where it is marked.
    """
    with jax.disable_jit(False):  # which would take a scan over layers apart
        jaxpr = jax.make_jaxpr(gradient)(params, *args).jaxpr
    found = _follow(jaxpr, [NUMBER] * len(jaxpr.invars), frozenset(axes))
    return jax.tree.unflatten(jax.tree.structure(params), found)


def checked(marks: Any) -> Any:
    """The same marks.

    Raises:
      ValueError: for a parameter whose mark would give a wrong estimate, or whose gradient
        is summed over devices and not marked.
    """
    for path, seen in jax.tree.leaves_with_path(marks):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if seen.is_error:
            raise ValueError(f"`each_group` must see {name} once: {seen.kind.value}.")
        if seen.kind == Kind.SUMMED:
            raise ValueError(
                f"The gradient of {name} is summed over devices, along the mapped axes "
                f"{sorted(seen.axes)}, before the square. If the model gathers it, mark it "
                "after with `each_group`. A model that exchanges anything else over these "
                "axes can't be estimated with this `axis_name`."
            )
    return marks


def _follow(jaxpr: Any, given: Sequence[Seen], axes: frozenset[str]) -> list[Seen]:
    """What the results of a jaxpr are, if its arguments are what is given."""
    seen = dict(zip(jaxpr.invars, given, strict=True))

    def read(x):
        if isinstance(x, core.Literal):
            return ZERO if not jnp.ndim(x.val) and x.val == 0 else NUMBER
        return seen.get(x, NUMBER)

    for eqn in jaxpr.eqns:
        results = _apply(eqn, [read(x) for x in eqn.invars], axes)
        seen.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn: Any, given: list[Seen], axes: frozenset[str]) -> list[Seen]:
    """What the results of an operation are."""
    name, params, results = eqn.primitive.name, eqn.params, len(eqn.outvars)
    first = given[0] if given else NUMBER
    if name == "name" and params["name"] == _BEGIN:
        return [Seen(Kind.GRADIENT)]
    if name == "name" and params["name"] == SQUARES:
        return [_marked(first)]
    if name == "scan":
        return _scan(eqn, given, axes)
    if name == "cond":
        branches = [
            _follow(_open(branch), given[1:], axes) for branch in params["branches"]
        ]
        either = [functools.reduce(_either, each) for each in zip(*branches, strict=True)]
        return [Seen(Kind.CHOSEN) if seen.is_squares else seen for seen in either]
    inside = _open(params.get("jaxpr", params.get("call_jaxpr")))
    if inside is not None and (len(inside.invars), len(inside.outvars)) == (
        len(given),
        results,
    ):
        return _follow(inside, given, axes)
    if any(_has_mark(jaxpr) for jaxpr in _jaxprs(params)):
        return [Seen(Kind.HIDDEN)] * results
    if name in ("optimization_barrier", "device_put"):
        return given

    if name in _SUMS:
        total = _sum(first, given[1] if name != "scatter-add" else given[2])
        repeats = name == "scatter-add" and not params["unique_indices"]
        return [_sum(total, total) if repeats else total]
    if name == "concatenate":
        return [functools.reduce(_either, given)]
    over = _axes_of(params)
    if name in _SUMS_OVER_DEVICES and params.get("axis_index_groups") is None:
        return [_over_devices(seen, over, axes) for seen in given]
    if name in _MAY_SUM and first != ZERO:
        if eqn.invars[0].aval.size == eqn.outvars[0].aval.size:
            return [first]
        if first.is_squares:
            return [Seen(Kind.TWICE)]
    elif name in _MOVES | _MAY_SUM:
        dtype = eqn.outvars[0].aval.dtype
        rounded = first.is_squares and jnp.promote_types(dtype, "float32") != dtype
        return [Seen(Kind.ROUNDED) if rounded else first] * results

    if wrong := next((seen for seen in given if seen.is_error), None):
        return [wrong] * results
    if any(seen.is_squares for seen in given):
        return [Seen(Kind.CHANGED)] * results
    if name in _VANISH and ZERO in given:
        return [ZERO] * results
    one = functools.reduce(_either, given, NUMBER)
    if one.kind == Kind.GRADIENT and over & axes:
        one = Seen(Kind.SUMMED, over & axes)
    return [one] * results


def _marked(gradient: Seen) -> Seen:
    """What a mark gives back."""
    if gradient.is_error:
        behind_a_mark = gradient.kind in (Kind.CHANGED, Kind.TWICE)
        return Seen(Kind.AGAIN) if behind_a_mark else gradient
    return {
        Kind.ZERO: ZERO,
        Kind.GRADIENT: Seen(Kind.SQUARES),
        Kind.SUMMED: Seen(Kind.EARLY),
        Kind.NUMBER: Seen(Kind.INNER),
    }[gradient.kind]


def _scan(eqn: Any, given: list[Seen], axes: frozenset[str]) -> list[Seen]:
    body = _open(eqn.params["jaxpr"])

    # Not all versions of JAX say how many arguments are carried from one step to the next.
    def sliced(outside, inside):
        """How many have an axis that the loop is over."""
        return sum(o.aval.ndim != i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - sliced(eqn.outvars, body.outvars)
    end = len(given) - sliced(eqn.invars, body.invars)
    start = end - carried
    while True:
        results = _follow(body, given, axes)
        carry = [_either(*both) for both in zip(given[start:end], results, strict=False)]
        if carry == given[start:end]:
            return results
        given = [*given[:start], *carry, *given[end:]]


def _either(a: Seen, b: Seen) -> Seen:
    """What a value is that is one or the other, or has entries of both."""
    if a == b or b == ZERO:
        return a
    if a == ZERO:
        return b
    if a.is_error or b.is_error:
        return a if a.is_error else b
    kinds = {a.kind, b.kind}
    if kinds == {Kind.SQUARES}:
        return Seen(Kind.TWICE)  # in one use summed over devices, and not in the other
    if Kind.SQUARES in kinds:
        return Seen(Kind.PARTLY)
    return Seen(Kind.SUMMED if Kind.SUMMED in kinds else Kind.GRADIENT, a.axes | b.axes)


def _sum(a: Seen, b: Seen) -> Seen:
    return Seen(Kind.TWICE) if a.is_squares and b.is_squares else _either(a, b)


def _over_devices(seen: Seen, over: frozenset[str], axes: frozenset[str]) -> Seen:
    """What a sum over mapped axes is, of which `axes` have groups of their own."""
    if seen.is_squares:
        return Seen(seen.kind, seen.axes | over) if over <= axes else Seen(Kind.TWICE)
    if seen.kind in (Kind.GRADIENT, Kind.SUMMED) and over & axes:
        return Seen(Kind.SUMMED, seen.axes | (over & axes))
    return seen


def _axes_of(params: dict[str, Any]) -> frozenset[str]:
    """The axes that an operation works over, or any inside of it, as in a loop."""
    names = params.get("axes", params.get("axis_name", ()))
    own = frozenset(names if isinstance(names, tuple | list) else (names,))
    return own.union(*(_axes_of(e.params) for each in _jaxprs(params) for e in each.eqns))


def _has_mark(jaxpr: Any) -> bool:
    return any(
        eqn.params.get("name") == SQUARES or any(map(_has_mark, _jaxprs(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(each), "eqns"):
                yield _open(each)


def _open(jaxpr: Any) -> Any:
    """Without its constants, where JAX keeps them beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)
