"""Checks of `each_group` annotations in the jaxpr of a group's gradient.

An annotation squares a gradient in the backward pass. Afterwards, the squares may be
moved, padded with zeros, stacked by a scan over layers or summed over devices, but not
changed otherwise. No gradient may be summed over devices before it is squared. The check is
an abstract interpretation: each value in the jaxpr has a kind, and `_apply` derives the
kinds of an operation's results from the kinds of its operands. A jaxpr that has neither
annotations nor communication is not checked.
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
    GRADIENT = enum.auto()  # one group's gradient, summed or exchanged over `Value.axes`
    SQUARES = enum.auto()  # each entry is 0, or a squared gradient entry summed over groups
    INVALID = enum.auto()  # makes the estimate wrong, for the reason in `Value.cause`


@dataclasses.dataclass(frozen=True)
class Value:
    kind: Kind
    axes: Axes = frozenset()  # mapped axes over which the value was summed or exchanged
    cause: str = ""

    @property
    def is_squares(self) -> bool:
        return self.kind == Kind.SQUARES

    def with_axes(self, axes: Axes) -> "Value":
        return dataclasses.replace(self, axes=self.axes | axes)


FORWARD, ZERO = Value(Kind.FORWARD), Value(Kind.ZERO)

_invalid = functools.partial(Value, Kind.INVALID, frozenset())
# The table of errors in docs/devices.md has a row for each cause.
PARTS = _invalid("as separate parts, at several uses, or in a loop that is not over layers")
AGAIN = _invalid("again after another annotation")
SOME_USES = _invalid("at some of its uses only")
CHANGED = _invalid("after it is changed")
BRANCH = _invalid("in a branch of a `cond`")
HIDDEN = _invalid("inside a `while` or a kernel")
INNER = _invalid("in a gradient that the model computes itself")
EARLY = _invalid("before it is gathered over devices")
ROUNDED = _invalid("after it is cast to 16 bits")

# These primitives only move (or cast) entries of operand 0. Other operands are indices.
_MOVES = {
    *("convert_element_type", "copy", "dynamic_slice", "layout_constraint", "name"),
    *("pcast", "pvary", "reshape", "reshard", "rev", "sharding_constraint", "slice"),
    *("split", "squeeze", "transpose"),
}
# If the result and the operand have the same size, these primitives only move entries.
_MOVES_OR_SUMS = {"broadcast_in_dim", "reduce_sum"}
_SUMS = {"add", "add_any", "dynamic_update_slice", "pad", "scatter-add"}
_PRODUCTS = {"conv_general_dilated", "dot_general", "integer_pow", "mul", "neg", "square"}
_SUMS_OVER_DEVICES = {"psum", "psum_invariant", "reduce_scatter"}


def trace_group_gradient(
    loss: GroupLoss, params: Any, grouped: GroupedBatch, names: tuple[str, ...]
) -> tuple[Callable[..., Any], Any, Any]:
    """Trace the gradient of one group's loss, and find the annotated parameters.

    Return the gradient function, the `Value` of each parameter's gradient, and a tree of
    bools, True for gradients that the function squares and sums over the mapped axis
    `GROUPS`. Instead of the tree, return None if no annotation uses this axis.
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
        # Annotated parameters stay sharded. Explicit shardings are part of types: retrace.
        gathered = grouped.gather(params, is_summed)
        fn, _ = trace(gradient, gathered, *grouped.first, axis_env=axis_env)
    return fn, values, is_summed


def named_gradient(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the gradient function of `loss`, with the loss's cotangent tagged by name."""
    # `jit` makes the gradient a single operation of the jaxpr, which is fast to evaluate.
    return jax.jit(jax.grad(lambda *args: _name_cotangent(loss(*args))))


def trace(
    fn: Callable[..., Any], params: Any, *args: Any, axis_env: Sequence[Any] = ()
) -> tuple[Callable[..., Any], Any]:
    """Trace `fn` to a jaxpr. Return a function that evaluates the jaxpr, and the jaxpr."""
    with jax.disable_jit(False):  # under `disable_jit`, tracing would unroll scans
        jaxpr = jax.make_jaxpr(fn, axis_env=list(axis_env))(params, *args)

    def call(params: Any, *args: Any) -> Any:
        flat = core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves((params, *args)))
        return jax.tree.structure(params).unflatten(flat)

    return call, jaxpr.jaxpr


def find_annotations(jaxpr: Any, params: Any, names: tuple[str, ...]) -> Any:
    """Return the `Value` of each parameter's gradient, given the gradient's jaxpr."""
    if names:  # `jaxpr.effects` is incomplete: `ppermute` adds no effect to it
        axes = _find_used_axes(jaxpr.eqns)
        needs_check = not axes.isdisjoint(names) or _has_annotation(jaxpr.eqns)
    else:
        needs_check = _uses_groups(jaxpr)
    values = [FORWARD] * len(jaxpr.outvars)
    if needs_check:
        values = _follow(jaxpr, [FORWARD] * len(jaxpr.invars), frozenset(names))
    return jax.tree.structure(params).unflatten(values)


def _uses_groups(jaxpr: Any) -> bool:
    # An annotation sums over the axis `GROUPS`, which the jaxpr records as an effect.
    return any(getattr(effect, "name", None) == GROUPS for effect in jaxpr.effects)


def _check_values(values: Any) -> None:
    """Raise ValueError if any parameter's estimate would be wrong."""
    for path, value in jax.tree.leaves_with_path(values):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if value.kind == Kind.INVALID:
            raise ValueError(
                f"`each_group` must annotate {name} once and as a whole, after it is "
                f"gathered and before it is used, but annotates it {value.cause}. "
                'See "Errors and remedies" in docs/devices.md.'
            )
        if value.kind == Kind.GRADIENT and value.axes:
            raise ValueError(
                f"The gradient of {name} is summed over {sorted(value.axes)} before the "
                "square. If the model gathers it, annotate it there with `each_group`."
            )


# The identity. Its backward pass tags the loss's cotangent by name for `_apply` to find.
_name_cotangent = jax.custom_vjp(lambda loss: loss)
_name_cotangent.defvjp(lambda x: (x, None), lambda _, g: (checkpoint_name(g, _BACKWARD),))


def _follow(jaxpr: Any, operands: Sequence[Value], names: Axes) -> list[Value]:
    """Return a jaxpr's abstract results, given the abstract values of its arguments."""
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
    """Return an operation's abstract results, given the abstract values of its operands."""
    name, params, results = eqn.primitive.name, eqn.params, len(eqn.outvars)
    first = operands[0] if operands else FORWARD
    if name == "name" and params["name"] == _BACKWARD:
        return [Value(Kind.GRADIENT)]
    if name == "name" and params["name"] == SQUARES:
        return [_apply_annotation(first)]

    # Operations that contain jaxprs.
    if name == "scan":
        return _follow_scan(eqn, operands, names)
    if name == "cond":
        return _follow_cond(eqn, operands, names)
    inner = _unwrap(params.get("jaxpr", params.get("call_jaxpr")))
    counts = len(operands), results
    if inner is not None and (len(inner.invars), len(inner.outvars)) == counts:
        return _follow(inner, operands, names)  # a call, such as `jit` or `remat`
    if _has_annotation([eqn]):
        return [HIDDEN] * results  # a `while` or a kernel may repeat the annotation
    if name in ("optimization_barrier", "device_put"):
        return operands  # one result for each operand

    # Sums of two operands. If one operand is zero, the sum has the other operand's kind.
    if name in _SUMS:
        total = _sum(first, operands[2 if name == "scatter-add" else 1])
        # With repeated indices, several updates may be added to the same entry.
        repeats = name == "scatter-add" and not params["unique_indices"]
        return [_sum(total, total) if repeats else total]
    if name == "concatenate":
        return [functools.reduce(_join, operands)]
    over = _find_used_axes([eqn])
    if name in _SUMS_OVER_DEVICES and params.get("axis_index_groups") is None:
        return [_sum_over_devices(value, over, names) for value in operands]

    # Operations that only move the entries of one operand.
    if name in _MOVES_OR_SUMS and first != ZERO:
        if eqn.invars[0].aval.size == eqn.outvars[0].aval.size:
            return [first]
        if first.is_squares:
            return [PARTS]  # a sum of the squares of different entries
    elif name in _MOVES | _MOVES_OR_SUMS:
        dtype = eqn.outvars[0].aval.dtype
        is_rounded = first.is_squares and jnp.promote_types(dtype, "float32") != dtype
        return [ROUNDED if is_rounded else first] * results

    # Other operations are valid for gradients but not for squares.
    if invalid := next((v for v in operands if v.kind == Kind.INVALID), None):
        return [invalid] * results
    if any(value.is_squares for value in operands):
        return [CHANGED] * results
    if name in _PRODUCTS and ZERO in operands:
        return [ZERO] * results
    result = functools.reduce(_join, operands, FORWARD)
    if result.kind == Kind.GRADIENT:  # such as `ppermute` along the axes `over`
        result = result.with_axes(over & names)
    return [result] * results


def _apply_annotation(gradient: Value) -> Value:
    """Return the abstract value of an annotation's result, given its operand's value."""
    if gradient in (CHANGED, PARTS):
        return AGAIN  # the cotangent was already squared
    if gradient.kind == Kind.GRADIENT:
        return EARLY if gradient.axes else Value(Kind.SQUARES)
    return INNER if gradient == FORWARD else gradient


def _follow_cond(eqn: Any, operands: list[Value], names: Axes) -> list[Value]:
    """Return the abstract values of a `cond`'s results: joins over all branches."""
    branches = map(_unwrap, eqn.params["branches"])
    results = [_follow(branch, operands[1:], names) for branch in branches]
    joined = [functools.reduce(_join, each) for each in zip(*results, strict=True)]
    # Squares are invalid here, because each group may take a different branch.
    return [BRANCH if value.is_squares else value for value in joined]


def _follow_scan(eqn: Any, operands: list[Value], names: Axes) -> list[Value]:
    """Iterate a scan's carry to a fixed point, and return the results' abstract values."""
    body = _unwrap(eqn.params["jaxpr"])

    # Some versions of JAX do not store the number of carried values. So count the scanned
    # arrays, which have one more axis outside of the body than inside.
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
    """Return the abstract value of an array whose entries have the value `a` or `b`."""
    if a == b or b == ZERO:
        return a
    if a == ZERO:
        return b
    if Kind.INVALID in (a.kind, b.kind):
        return a if a.kind == Kind.INVALID else b
    if a.is_squares and b.is_squares:
        return PARTS  # `a` and `b` are summed over different mapped axes
    if a.is_squares or b.is_squares:
        return SOME_USES
    return Value(Kind.GRADIENT, a.axes | b.axes)


def _sum(a: Value, b: Value) -> Value:
    # The sum of two squares is not the square of the sum.
    return PARTS if a.is_squares and b.is_squares else _join(a, b)


def _sum_over_devices(value: Value, over: Axes, names: Axes) -> Value:
    """Return the abstract value of a sum of `value` over the mapped axes `over`."""
    if value.is_squares:
        # Along `names`, devices hold different groups. Along other axes, partial sums.
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
    """Yield the operations and, recursively, the operations of the jaxprs inside them."""
    for eqn in eqns:
        yield eqn
        for inner in map(_unwrap, jax.tree.leaves(eqn.params)):
            yield from all_operations(getattr(inner, "eqns", ()))


def _unwrap(jaxpr: Any) -> Any:
    """Return the jaxpr inside a closed jaxpr. Return other arguments unchanged."""
    return getattr(jaxpr, "jaxpr", jaxpr)
