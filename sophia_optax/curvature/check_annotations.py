"""Find and check the annotations of `each_group` in the jaxpr of a group's gradient.

The squares must reach their parameter as they are. They may be moved, padded with zeros,
stacked by a scan over layers, or summed over devices, but not changed otherwise. And no
gradient may be summed over devices before it is squared. The check is an abstract
interpretation: each value in the jaxpr has a kind, and `_apply` derives the kinds of the
results of an operation from those of its operands.

Models without annotations and without communication are not checked.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from sophia_optax.curvature.each_group import DEVICE, GROUPS, SQUARES
from sophia_optax.curvature.groups import GroupedBatch

_BACKWARD = "sophia_optax.backward"  # the name of the loss's cotangent in a jaxpr

Axes = frozenset[str]
GroupLoss = Callable[[Any, dict[str, Any], jax.Array], jax.Array]


class Kind(enum.Enum):
    FORWARD = enum.auto()  # does not depend on the cotangent of the loss
    ZERO = enum.auto()
    GRADIENT = enum.auto()  # of one group, or if `Value.axes` are given, of several devices
    SQUARES = enum.auto()  # each entry is 0, or a sum over groups of one entry squared
    INVALID = enum.auto()  # the estimate would be wrong, because of `Value.cause`


@dataclasses.dataclass(frozen=True)
class Value:
    """An abstract value."""

    kind: Kind
    axes: Axes = frozenset()  # the mapped axes that it was summed over
    cause: str = ""

    @property
    def is_squares(self) -> bool:
        return self.kind == Kind.SQUARES

    def with_axes(self, axes: Axes) -> "Value":
        return dataclasses.replace(self, axes=self.axes | axes)


FORWARD, ZERO = Value(Kind.FORWARD), Value(Kind.ZERO)

_invalid = functools.partial(Value, Kind.INVALID, frozenset())
# Each cause has a row in the table of docs/devices.md.
PARTS = _invalid("as separate parts, at several uses, or in a loop that is not over layers")
AGAIN = _invalid("again after another annotation")
SOME_USES = _invalid("at some of its uses only")
CHANGED = _invalid("after it is changed")
BRANCH = _invalid("in a branch of a `cond`")
HIDDEN = _invalid("inside a `while` or a kernel")
INNER = _invalid("in a gradient that the model computes itself")
EARLY = _invalid("before it is gathered over devices")
ROUNDED = _invalid("after it is cast to 16 bits")

# The result of a move has the kind of its first operand. Other operands are indices.
_MOVES = {
    *("convert_element_type", "copy", "dynamic_slice", "layout_constraint", "name"),
    *("pcast", "pvary", "reshape", "reshard", "rev", "sharding_constraint", "slice"),
    *("split", "squeeze", "transpose"),
}
# These are moves if the result has as many entries as the operand. Otherwise they sum.
_MOVES_OR_SUMS = {"broadcast_in_dim", "reduce_sum"}
_SUMS = {"add", "add_any", "dynamic_update_slice", "pad", "scatter-add"}
_PRODUCTS = {"conv_general_dilated", "dot_general", "integer_pow", "mul", "neg", "square"}
_SUMS_OVER_DEVICES = {"psum", "psum_invariant", "reduce_scatter"}


class GroupGradient(NamedTuple):
    """The gradient of a group's loss, and trees like the parameters that describe it."""

    fn: Callable[..., Any]  # of the parameters, a group's batch and its number
    is_squared: Any  # bool: the result is squares
    is_summed: Any  # bool: `fn` sums it over the axis `GROUPS`; None without this axis
    axes: Any  # the mapped axes that squares are summed over


def trace_group_gradient(
    loss: GroupLoss, params: Any, grouped: GroupedBatch, names: tuple[str, ...]
) -> GroupGradient:
    """Trace the gradient of one group's loss, and find the parameters that it squares.

    Raise ValueError for a parameter whose annotation would make the estimate wrong, or if a
    gradient is summed over the mapped axes `names` without an annotation.
    """
    axis_env = [(DEVICE, 1)] if names else [(GROUPS, grouped.parallel)]
    gathered = grouped.gather(params)
    fn, jaxpr = trace_gradient(loss, gathered, *grouped.first, axis_env=axis_env)
    values = jax.tree.map(lambda _: FORWARD, params)
    if names:
        needs_check = communicates(jaxpr, names) or _has_annotation(jaxpr)
    else:  # an annotation sums over the axis of the groups, which leaves an effect
        effects = (getattr(effect, "name", None) for effect in jaxpr.effects)
        needs_check = GROUPS in effects
    if needs_check:
        values = check_values(find_annotations(jaxpr, params, names))
    is_squared = jax.tree.map(lambda value: value.is_squares, values)
    is_summed = is_squared if needs_check and not names else None
    if grouped.axes and is_summed:
        # On Explicit axes the types of annotated parameters say that they stay sharded.
        gathered = grouped.gather(params, is_summed)
        fn, _ = trace_gradient(loss, gathered, *grouped.first, axis_env=axis_env)
    axes = jax.tree.map(lambda value: value.axes, values)
    return GroupGradient(fn, is_squared, is_summed, axes)


def trace_gradient(
    loss: Callable[..., jax.Array], params: Any, *args: Any, axis_env: Sequence[Any] = ()
) -> tuple[Callable[..., Any], Any]:
    """Return the traced gradient of `loss(params, *args)`, as a function and as a jaxpr.

    The function takes arguments of the same types and does not call `loss` again.
    `axis_env` has the names and sizes of mapped axes to bind.
    """
    # Inside `jit`, so that a call of the function binds one operation, not all of them.
    gradient = jax.jit(jax.grad(lambda *args: _name_cotangent(loss(*args))))
    with jax.disable_jit(False):  # under `disable_jit`, tracing would unroll scans
        jaxpr = jax.make_jaxpr(gradient, axis_env=list(axis_env))(params, *args)

    def call(params: Any, *args: Any) -> Any:
        flat = core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves((params, *args)))
        return jax.tree.structure(params).unflatten(flat)

    return call, jaxpr.jaxpr


def communicates(jaxpr: Any, names: tuple[str, ...]) -> bool:
    """Return whether an operation of the jaxpr uses one of the mapped axes."""
    # The effects of the jaxpr do not suffice: `ppermute` leaves no effect.
    return any(not _find_used_axes(eqn.params).isdisjoint(names) for eqn in jaxpr.eqns)


def find_annotations(jaxpr: Any, params: Any, names: tuple[str, ...]) -> Any:
    """Return the value of each parameter's gradient, a tree like `params`."""
    found = _follow(jaxpr, [FORWARD] * len(jaxpr.invars), frozenset(names))
    return jax.tree.structure(params).unflatten(found)


def check_values(values: Any) -> Any:
    """Return the values. Raise ValueError if the estimate of a parameter would be wrong."""
    for path, value in jax.tree.leaves_with_path(values):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if value.kind == Kind.INVALID:
            raise ValueError(
                f"`each_group` must annotate {name} once and as a whole, but annotates it "
                f"{value.cause}. The documentation on many devices has the remedy."
            )
        if value.kind == Kind.GRADIENT and value.axes:
            raise ValueError(
                f"The gradient of {name} is summed over the mapped axes "
                f"{sorted(value.axes)} before the square. If the model gathers it, "
                "annotate it there with `each_group`. Other communication is unsupported."
            )
    return values


@jax.custom_vjp
def _name_cotangent(loss: jax.Array) -> jax.Array:
    """Return the loss, and name its cotangent, from which `_follow` starts."""
    return loss


_name_cotangent.defvjp(lambda x: (x, None), lambda _, g: (checkpoint_name(g, _BACKWARD),))


def _follow(jaxpr: Any, operands: Sequence[Value], names: Axes) -> list[Value]:
    """Return the values of the results of a jaxpr, given those of its arguments."""
    values = dict(zip(jaxpr.invars, operands, strict=True))

    def read(x: Any) -> Value:
        if isinstance(x, core.Literal):
            return ZERO if not jnp.ndim(x.val) and x.val == 0 else FORWARD
        return values.get(x, FORWARD)

    for eqn in jaxpr.eqns:
        results = _apply(eqn, [read(x) for x in eqn.invars], names)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn: Any, operands: list[Value], names: Axes) -> list[Value]:
    """Return the values of the results of an operation."""
    name, params, results = eqn.primitive.name, eqn.params, len(eqn.outvars)
    first = operands[0] if operands else FORWARD
    if name == "name" and params["name"] == _BACKWARD:
        return [Value(Kind.GRADIENT)]
    if name == "name" and params["name"] == SQUARES:
        return [_apply_annotation(first)]

    # Operations with jaxprs inside.
    if name == "scan":
        return _follow_scan(eqn, operands, names)
    if name == "cond":
        return _follow_cond(params["branches"], operands[1:], names)
    inner = _unwrap(params.get("jaxpr", params.get("call_jaxpr")))
    counts = len(operands), results
    if inner is not None and (len(inner.invars), len(inner.outvars)) == counts:
        return _follow(inner, operands, names)  # a call, such as `jit` or `remat`
    if any(_has_annotation(jaxpr) for jaxpr in _inner_jaxprs(params)):
        return [HIDDEN] * results  # a `while` or a kernel: how often it runs is unknown
    if name in ("optimization_barrier", "device_put"):
        return operands  # one result for each operand

    # Sums of two operands. If one of them is zero, the result is the other.
    if name in _SUMS:
        total = _sum(first, operands[2 if name == "scatter-add" else 1])
        # Indices that repeat add several entries of the updates to one entry.
        repeats = name == "scatter-add" and not params["unique_indices"]
        return [_sum(total, total) if repeats else total]
    if name == "concatenate":
        return [functools.reduce(_join, operands)]
    over = _find_used_axes(params)
    if name in _SUMS_OVER_DEVICES and params.get("axis_index_groups") is None:
        return [_sum_over_devices(value, over, names) for value in operands]

    # Moves of the entries of one operand.
    if name in _MOVES_OR_SUMS and first != ZERO:
        if eqn.invars[0].aval.size == eqn.outvars[0].aval.size:
            return [first]
        if first.is_squares:
            return [PARTS]  # a sum of the squares of different entries
    elif name in _MOVES | _MOVES_OR_SUMS:
        dtype = eqn.outvars[0].aval.dtype
        is_rounded = first.is_squares and jnp.promote_types(dtype, "float32") != dtype
        return [ROUNDED if is_rounded else first] * results

    # Other operations, which are valid for gradients but not for squares.
    if invalid := next((v for v in operands if v.kind == Kind.INVALID), None):
        return [invalid] * results
    if any(value.is_squares for value in operands):
        return [CHANGED] * results
    if name in _PRODUCTS and ZERO in operands:
        return [ZERO] * results
    result = functools.reduce(_join, operands, FORWARD)
    if result.kind == Kind.GRADIENT:  # such as an `all_to_all` or a `ppermute`
        result = result.with_axes(over & names)
    return [result] * results


def _apply_annotation(gradient: Value) -> Value:
    """Return the value of the squares of an annotation, given its cotangent."""
    if gradient.kind == Kind.INVALID:
        # The cotangent was squares before it was changed or summed.
        return AGAIN if gradient in (CHANGED, PARTS) else gradient
    if gradient.kind == Kind.GRADIENT:
        return EARLY if gradient.axes else Value(Kind.SQUARES)
    if gradient.kind == Kind.ZERO:
        return ZERO  # the loss does not depend on this weight
    return INNER if gradient.kind == Kind.FORWARD else AGAIN


def _follow_cond(
    branches: Sequence[Any], operands: list[Value], names: Axes
) -> list[Value]:
    results = [_follow(_unwrap(branch), operands, names) for branch in branches]
    joined = [functools.reduce(_join, each) for each in zip(*results, strict=True)]
    # Each group may take a different branch.
    return [BRANCH if value.is_squares else value for value in joined]


def _follow_scan(eqn: Any, operands: list[Value], names: Axes) -> list[Value]:
    """Return the values of a scan: follow its body until those of the carry are stable."""
    body = _unwrap(eqn.params["jaxpr"])

    # Some versions of JAX do not give the number of carried values. Scanned arguments have
    # one axis more outside of the body.
    def count_scanned(outside: Any, inside: Any) -> int:
        return sum(o.aval.ndim != i.aval.ndim for o, i in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - count_scanned(eqn.outvars, body.outvars)
    end = len(operands) - count_scanned(eqn.invars, body.invars)
    start = end - carried
    while True:
        results = _follow(body, operands, names)
        carry = [_join(*both) for both in zip(operands[start:end], results, strict=False)]
        if carry == operands[start:end]:
            return results
        operands = [*operands[:start], *carry, *operands[end:]]


def _join(a: Value, b: Value) -> Value:
    """Return the join of two abstract values, for an array with entries of either."""
    if a == b or b == ZERO:
        return a
    if a == ZERO:
        return b
    if Kind.INVALID in (a.kind, b.kind):
        return a if a.kind == Kind.INVALID else b
    if a.is_squares and b.is_squares:
        return PARTS  # summed over devices in one use and not in the other
    if a.is_squares or b.is_squares:
        return SOME_USES
    return Value(Kind.GRADIENT, a.axes | b.axes)


def _sum(a: Value, b: Value) -> Value:
    # A sum of squares is not the square of a sum.
    return PARTS if a.is_squares and b.is_squares else _join(a, b)


def _sum_over_devices(value: Value, over: Axes, names: Axes) -> Value:
    """Return the value of a sum over axes. Along `names` each device has its own groups."""
    if value.is_squares:
        # Along other axes, devices hold parts of one group's gradient.
        return value.with_axes(over) if over <= names else PARTS
    if value.kind == Kind.GRADIENT:
        return value.with_axes(over & names)
    return value


def _find_used_axes(params: dict[str, Any]) -> Axes:
    """Return the mapped axes that an operation uses, or an operation inside it."""
    names = params.get("axes", params.get("axis_name", ()))
    own = frozenset(names if isinstance(names, tuple | list) else (names,))
    inner = (
        _find_used_axes(e.params) for jaxpr in _inner_jaxprs(params) for e in jaxpr.eqns
    )
    return own.union(*inner)


def _has_annotation(jaxpr: Any) -> bool:
    return any(
        eqn.params.get("name") == SQUARES
        or any(map(_has_annotation, _inner_jaxprs(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_unwrap(each), "eqns"):
                yield _unwrap(each)


def _unwrap(jaxpr: Any) -> Any:
    """Return the jaxpr of a closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr)
