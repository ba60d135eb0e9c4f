"""Steps to a tolerance against the condition number: the theory of the paper's section 4.

    python -m benchmarks.conditioning

Minimises Σ_i w_i φ((Aθ)_i) in float64, with weights w from 1 to the condition number and
three φ: x²/2, cosh(x) - 1 and log cosh(x). For the first A is orthogonal, for the others
a shear besides, so that the Hessian's eigenvectors move. Every run starts with the same
loss in each term, and counts the steps until a thousandth of the loss is left. Each
method takes the best of a grid of learning rates, but for Sophia with the whole Hessian:
it has the η = 1/2 and ρ = R / (2√n) of the paper's theorem. The worst of the rotations
counts.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import machine, measure
from sophia_optax import scale_by_sophia
from sophia_optax.variants import full_matrix_sophia


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps to a tolerance against the condition number."""

    dimensions: tuple[int, ...] = (2, 10, 50)
    exponents: tuple[int, ...] = tuple(range(9))
    """Of 10, for the condition numbers."""

    rotations: int = 4
    tolerance: float = 1e-3
    """Of the loss at the start."""

    most_steps: int = 100_000
    """Where a run is given up."""


FULL = Config(dimensions=(2, 5, 10, 20, 50), rotations=16)


class Shape(NamedTuple):
    """A function of one variable, least at 0 with a curvature of 1."""

    value: Callable[[jax.Array], jax.Array]
    inverse: Callable[[float], float]
    """The positive x of a value."""

    radius: float
    """R: within it curvatures differ by a factor of at most 2."""

    is_quadratic: bool = False


SHAPES = {
    "quadratic": Shape(lambda x: x**2 / 2, lambda y: math.sqrt(2 * y), 1.0, True),
    "cosh": Shape(lambda x: jnp.cosh(x) - 1, lambda y: math.acosh(1 + y), math.log(2)),
    "log cosh": Shape(
        lambda x: jnp.abs(x) + jnp.log1p(jnp.exp(-2 * jnp.abs(x))) - math.log(2),
        lambda y: math.acosh(math.exp(y)),
        math.log(2) / 2,
    ),
}


class Problem(NamedTuple):
    matrix: jax.Array  # A, shape (n, n)
    weights: jax.Array  # w, shape (n,)
    start: jax.Array  # shape (n,)


def problem(
    name: str, dimension: int, condition: float, seed: int | None, far: float = 2.0
) -> Problem:
    """A problem of the condition number whose flattest term starts at `far`.

    Without a seed A is the identity.
    """
    shape = SHAPES[name]
    weights = np.geomspace(1, condition, dimension)
    matrix, rng = np.eye(dimension), np.random.default_rng(seed)
    if seed is not None:
        matrix, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
        if not shape.is_quadratic:
            shear = rng.normal(size=(dimension, dimension)) / math.sqrt(dimension)
            matrix = matrix + 0.3 * np.triu(shear, 1)
            matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    loss = float(shape.value(jnp.asarray(far)))  # of each term
    x = np.array([shape.inverse(loss / weight) for weight in weights])
    if seed is not None:
        x *= rng.choice([-1, 1], dimension)
    return Problem(*map(jnp.asarray, (matrix, weights, np.linalg.solve(matrix, x))))


def loss_fn(name: str, problem: Problem, params: jax.Array) -> jax.Array:
    return jnp.sum(problem.weights * SHAPES[name].value(problem.matrix @ params))


def curvatures(name: str, problem: Problem, params: jax.Array) -> jax.Array:
    """c of the Hessian A^T diag(c) A."""
    second = jax.vmap(jax.grad(jax.grad(SHAPES[name].value)))
    return problem.weights * second(problem.matrix @ params)


def _sophia(name: str, problem: Problem, params: jax.Array, rho: jax.Array) -> Any:
    tx, scaled = full_matrix_sophia(1.0, rho), curvatures(name, problem, params)
    hessian = (problem.matrix.T * scaled) @ problem.matrix
    grads = jax.grad(loss_fn, 2)(name, problem, params)
    return tx.update(grads, tx.init(params), params, hessian=hessian)[0]


def _diagonal_sophia(name: str, problem: Problem, params: jax.Array, rho: jax.Array) -> Any:
    tx = optax.chain(scale_by_sophia(0.0, 0.0, 1.0, clip_threshold=rho), optax.scale(-1.0))
    diagonal = curvatures(name, problem, params) @ problem.matrix**2
    grads = jax.grad(loss_fn, 2)(name, problem, params)
    return tx.update(grads, tx.init(params), params, hessian=diagonal)[0]


def _sign(name: str, problem: Problem, params: jax.Array, rho: jax.Array) -> Any:
    return -jnp.sign(jax.grad(loss_fn, 2)(name, problem, params))


def _gradient(name: str, problem: Problem, params: jax.Array, rho: jax.Array) -> Any:
    return -jax.grad(loss_fn, 2)(name, problem, params)


METHODS = {
    "sophia": _sophia,
    "sophia, diagonal": _diagonal_sophia,
    "SignGD": _sign,
    "GD": _gradient,
}
"""The step of each for a learning rate of one."""


def rates(name: str, method: str, problem: Problem, goal: float) -> list[float]:
    """The learning rates that a method may choose from."""
    dimension = len(problem.start)
    if method == "sophia":
        return [0.5]
    if method == "sophia, diagonal":  # the diagonal may be too small by the dimension
        return [2.0**-k for k in range(1, 3 + math.ceil(math.log2(dimension)))]
    weights = np.asarray(problem.weights)
    if method == "SignGD":  # going to and fro, a rate leaves a loss of its own
        rate = math.sqrt(2 * goal / weights.sum())
        # On turned axes only a rate as small as 1 / κ leaves a valley's walls.
        smallest = math.ceil(math.log2(weights.max()) / 2) + 2
        return [rate * 2.0**k for k in range(-smallest, 4)]
    points = [problem.start, jnp.zeros_like(problem.start)]
    steepest = [
        jnp.linalg.norm(problem.matrix.T * curvatures(name, problem, x), 2) for x in points
    ]
    return [2.0**k / float(max(steepest)) for k in (-1, 0, 0.9)]


def steps(name: str, method: str, problem: Problem, config: Config) -> int | None:
    """Until the best learning rate has arrived; None if none does."""
    shape, dimension = SHAPES[name], len(problem.start)
    goal = config.tolerance * float(loss_fn(name, problem, problem.start))
    chosen = rates(name, method, problem, goal)
    if method == "GD" and shape.is_quadratic:
        return _steps_of_gd(problem, chosen, goal)
    rho = shape.radius / (2 * math.sqrt(dimension))
    made = int(
        _race(name, method, config.most_steps, problem, jnp.array(chosen), goal, rho)
    )
    return None if made < 0 else made


def _steps_of_gd(problem: Problem, chosen: list[float], goal: float) -> int:
    """In closed form: each term of a quadratic shrinks by itself."""
    weights = np.asarray(problem.weights)
    x = np.asarray(problem.matrix @ problem.start)

    def left(rate: float, t: int) -> float:
        return float(np.sum(weights * ((1 - rate * weights) ** t * x) ** 2) / 2)

    def first(rate: float) -> int:
        return bisect.bisect_left(range(1 << 40), -goal, key=lambda t: -left(rate, t))

    return min(map(first, chosen))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _race(name, method, most_steps, problem, chosen, goal, rho) -> jax.Array:
    """Steps until the first of the learning rates has arrived, or -1."""
    loss = functools.partial(loss_fn, name, problem)

    def arrived(params):
        return jnp.any(jax.vmap(loss)(params) <= goal)

    def body(carry):
        step, params, _ = carry
        moves = jax.vmap(lambda p: METHODS[method](name, problem, p, rho))(params)
        params += chosen[:, None] * moves
        return step + 1, params, arrived(params)

    params = jnp.broadcast_to(problem.start, (len(chosen), len(problem.start)))
    made, _, is_there = jax.lax.while_loop(
        lambda carry: ~carry[2] & (carry[0] < most_steps),
        body,
        (jnp.int32(0), params, arrived(params)),
    )
    return jnp.where(is_there, made, -1)


def measure_conditioning(config: Config) -> dict[str, Any]:
    with jax.enable_x64(True):
        return _measure(config)


def _measure(config: Config) -> dict[str, Any]:
    rows = []
    for name in SHAPES:
        for dimension in config.dimensions:
            for method in METHODS:
                for turned in (False, True):
                    row = {"function": name, "dimension": dimension, "method": method}
                    row |= {"turned": turned, "steps": {}}
                    for exponent in config.exponents:
                        worst = _worst(name, dimension, method, turned, exponent, config)
                        row["steps"][f"1e{exponent}"] = worst
                        if worst is None:  # nor will it with a larger one
                            break
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    results = {"config": dataclasses.asdict(config), "rows": rows}
    draw(results, machine.folder())
    return results


def _worst(
    name: str, dimension: int, method: str, turned: bool, exponent: int, config: Config
) -> int | None:
    worst = 0
    for seed in range(config.rotations) if turned else [None]:
        made = steps(name, method, problem(name, dimension, 10.0**exponent, seed), config)
        if made is None:
            return None
        worst = max(worst, made)
    return worst


def growth(row: dict[str, Any]) -> float | None:
    """The power of the condition number with which steps grow, from 100 upwards."""
    points = [
        (float(kappa), made)
        for kappa, made in row["steps"].items()
        if made and float(kappa) >= 1e2
    ]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def table(results: dict[str, Any]) -> str:
    """A row for each method, a column for each condition number."""
    config = results["config"]

    def made(kappa):
        def cell(row):
            if kappa not in row["steps"]:
                return ""
            count = row["steps"][kappa]
            return f"{count:,}" if count is not None else f"> {config['most_steps']:,}"

        return cell

    def power(row):
        found = growth(row)
        return "" if found is None else f"{found:.2f}"

    columns = {
        "function": lambda row: row["function"],
        "n": lambda row: str(row["dimension"]),
        "method": lambda row: row["method"],
        "axes": lambda row: "turned" if row["turned"] else "own",
        **{f"1e{e}": made(f"1e{e}") for e in config["exponents"]},
        "grows as κ to the": power,
    }
    return (
        f"Steps until {config['tolerance']:g} of the loss is left, for condition numbers "
        f"κ; of turned axes the worst of {config['rotations']}.\n\n"
        + measure.markdown(results["rows"], columns)
    )


def draw(results: dict[str, Any], folder: Path) -> None:
    """Writes conditioning.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = results["config"]
    shown = sorted({config["dimensions"][0], config["dimensions"][-1]})
    figure, all_axes = plt.subplots(
        len(shown), len(SHAPES), sharex=True, sharey=True, squeeze=False, figsize=(13, 7.5),
        layout="constrained",
    )  # fmt: skip
    for (i, dimension), (j, name) in itertools.product(enumerate(shown), enumerate(SHAPES)):
        axes = all_axes[i][j]
        for row in results["rows"]:
            if (row["function"], row["dimension"]) != (name, dimension):
                continue
            points = [(float(k), made) for k, made in row["steps"].items() if made]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{list(METHODS).index(row['method'])}",
                    ls="-" if row["turned"] else "--",
                    marker="o" if row["turned"] else "x",
                    ms=4,
                    label=f"{row['method']}, {'turned' if row['turned'] else 'own'} axes",
                )
        axes.set(xscale="log", yscale="log", title=f"{name}, n = {dimension}")
        axes.grid(alpha=0.3)
        if i == len(shown) - 1:
            axes.set_xlabel("condition number")
        if not j:
            axes.set_ylabel(f"steps to {config['tolerance']:g} of the loss")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "conditioning.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    measure.run("conditioning", measure_conditioning, table, small=Config(), full=FULL)
