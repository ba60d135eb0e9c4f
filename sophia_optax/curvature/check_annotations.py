"""Find and check the annotations of `each_group` in the jaxpr of a group's gradient.

The squares may be moved, padded with zeros, stacked by a scan over layers, or summed over
devices on their way to the parameter, but not changed otherwise. And no gradient may be
summed over devices before it is squared. The check is an abstract interpretation: each
value in the jaxpr has a kind, and `_apply` derives the kinds of the results of an operation
from those of its operands. Without annotations and communication nothing is checked.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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


def trace_group_gradient(
    loss: GroupLoss, params: Any, grouped: GroupedBatch, names: tuple[str, ...]
) -> tuple[Callable[..., Any], Any, Any]:
    """Trace the gradient of one group's loss, and find the parameters that it squares.

    Return the gradient, a `Value` for each parameter, and for each parameter whether its
    gradient is already summed over the mapped axis `GROUPS`, or None without annotations.
    """
    axis_env = [(DEVICE, 1)] if names else [(GROUPS, grouped.parallel)]
    gathered = grouped.gather(params)
    gradient = named_gradient(loss)
    fn, jaxpr = trace(gradient, gathered, *grouped.first, axis_env=axis_env)
    values = find_annotations(jaxpr, params, names)
    _check_values(values)
    if not _uses_groups(jaxpr):
        return fn, values, None
    is_summed = jax.tree.map(lambda value: value.is_squares, values)
    if grouped.axes:
        # On Explicit axes the types of annotated parameters say that they stay sharded.
        gathered = grouped.gather(params, is_summed)
        fn, _ = trace(gradient, gathered, *grouped.first, axis_env=axis_env)
    return fn, values, is_summed


def named_gradient(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the gradient of a loss, with the cotangent of the loss named in its jaxpr."""
    # Inside `jit`, so that a call of its jaxpr binds one operation, not all of them.
    return jax.jit(jax.grad(lambda *args: _name_cotangent(loss(*args))))


def trace(
    fn: Callable[..., Any], params: Any, *args: Any, axis_env: Sequence[Any] = ()
) -> tuple[Callable[..., Any], Any]:
    """Trace `fn`. Return a function that evaluates its jaxpr, and the jaxpr."""
    with jax.disable_jit(False):  # under `disable_jit`, tracing would unroll scans
        jaxpr = jax.make_jaxpr(fn, axis_env=list(axis_env))(params, *args)

    def call(params: Any, *args: Any) -> Any:
        flat = core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves((params, *args)))
        return jax.tree.structure(params).unflatten(flat)

    return call, jaxpr.jaxpr


def find_annotations(jaxpr: Any, params: Any, names: tuple[str, ...]) -> Any:
    """Return the `Value` of each parameter's gradient, given the gradient's jaxpr."""
    if names:  # not by `jaxpr.effects`: `ppermute` has no effect
        axes = _find_used_axes(jaxpr.eqns)
        needs_check = not axes.isdisjoint(names) or _has_annotation(jaxpr.eqns)
    else:
        needs_check = _uses_groups(jaxpr)
    values = [FORWARD] * len(jaxpr.outvars)
    if needs_check:
        values = _follow(jaxpr, [FORWARD] * len(jaxpr.invars), frozenset(names))
    return jax.tree.structure(params).unflatten(values)


def _uses_groups(jaxpr: Any) -> bool:
    # An annotation sums over the axis `GROUPS`, which leaves an effect.
    return any(getattr(effect, "name", None) == GROUPS for effect in jaxpr.effects)


def _check_values(values: Any) -> None:
    """Raise ValueError if the estimate of a parameter would be wrong."""
    for path, value in jax.tree.leaves_with_path(values):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if value.kind == Kind.INVALID:
            raise ValueError(
                f"`each_group` must annotate {name} once and as a whole, but annotates it "
                f'{value.cause}. See "Errors and remedies" in docs/devices.md.'
            )
        if value.kind == Kind.GRADIENT and value.axes:
            raise ValueError(
                f"The gradient of {name} is summed over {sorted(value.axes)} before the "
                "square. If the model gathers it, annotate it there with `each_group`."
            )


# The identity. It names the cotangent of the loss, from which `_follow` starts.
_name_cotangent = jax.custom_vjp(lambda loss: loss)
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
        return _follow_cond(eqn, operands, names)
    inner = _unwrap(params.get("jaxpr", params.get("call_jaxpr")))
    counts = len(operands), results
    if inner is not None and (len(inner.invars), len(inner.outvars)) == counts:
        return _follow(inner, operands, names)  # a call, such as `jit` or `remat`
    if _has_annotation([eqn]):
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
    over = _find_used_axes([eqn])
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
    """Return the value of the squares of an annotation, given that of the square."""
    if gradient in (CHANGED, PARTS):
        return AGAIN  # the cotangent was squares already
    if gradient.kind == Kind.GRADIENT:
        return EARLY if gradient.axes else Value(Kind.SQUARES)
    return INNER if gradient == FORWARD else gradient


def _follow_cond(eqn: Any, operands: list[Value], names: Axes) -> list[Value]:
    """Return the joins of the values of the branches."""
    branches = map(_unwrap, eqn.params["branches"])
    results = [_follow(branch, operands[1:], names) for branch in branches]
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


def _find_used_axes(eqns: Iterable[Any]) -> Axes:
    """Return the mapped axes that the operations use."""
    params = (eqn.params for eqn in all_operations(eqns))
    axes = (p.get("axes", p.get("axis_name", ())) for p in params)
    return frozenset().union(*(a if isinstance(a, tuple | list) else (a,) for a in axes))


def _has_annotation(eqns: Iterable[Any]) -> bool:
    return any(eqn.params.get("name") == SQUARES for eqn in all_operations(eqns))


def all_operations(eqns: Iterable[Any]) -> Iterator[Any]:
    """Yield the operations, and those of the jaxprs inside them."""
    for eqn in eqns:
        yield eqn
        for inner in map(_unwrap, jax.tree.leaves(eqn.params)):
            yield from all_operations(getattr(inner, "eqns", ()))


def _unwrap(jaxpr: Any) -> Any:
    """Return the jaxpr of a closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr)
