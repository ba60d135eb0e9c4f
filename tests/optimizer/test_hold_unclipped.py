import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from sophia_optax import (
    hold_unclipped,
    hutchinson,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia_g,
    sophia_h,
    sophia_metrics,
    unclipped_fraction,
)


def draw(seed, *shape):
    """Numbers of both signs that differ by decades."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10 ** rng.normal(size=shape)).astype(np.float32)


PARAMS = {"w": draw(0, 6, 7), "b": draw(1, 30), "s": draw(2)}
GRADS = {"w": draw(3, 6, 7), "b": draw(4, 30), "s": draw(5)}
HESSIAN = {name: draw(6 + p.ndim, *p.shape) for name, p in PARAMS.items()}  # of both signs


def quantile(m, h, fraction):
    """The ⌊f n⌋-th smallest |m| / h, from 0, of those that count."""
    counted = (h > 0) & (m != 0)
    ratios = np.sort(np.abs(m[counted]) / h[counted])
    return ratios[min(int(np.floor(fraction * len(ratios))), len(ratios) - 1)]


def one_step(tx, grads=GRADS, hessian=HESSIAN, params=PARAMS):
    return jax.jit(tx.update)(grads, tx.init(params), params, hessian=hessian)


def held(rule, **settings):
    return scale_by_sophia(**{"b1": 0.0, "b2": 0.0, "gamma": rule} | settings)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.93, 1.0])
def test_gamma_is_the_quantile_of_each_parameter(fraction):
    updates, state = one_step(held(hold_unclipped(fraction)))
    for row, name in enumerate(sorted(PARAMS)):
        m, h = GRADS[name], HESSIAN[name]
        gamma = quantile(m.ravel(), h.ravel(), fraction)
        np.testing.assert_allclose(state[1].divisor_gamma[row, 0], gamma, rtol=1e-6)
        expected = np.clip(m / np.maximum(gamma * h, 1e-12), -1, 1)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)
        inside = np.sum(np.abs(updates[name]) < 1 - 1e-6)
        counted = np.sum(h > 0)
        assert inside == min(np.floor(fraction * counted), counted - 1)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_one_gamma_for_all_is_the_quantile_of_all(fraction):
    _, state = one_step(held(hold_unclipped(fraction, per="all")))
    m, h = (np.concatenate([t[n].ravel() for n in PARAMS]) for t in (GRADS, HESSIAN))
    assert state[1].divisor_gamma.shape == ()
    gamma = quantile(m, h, fraction)
    np.testing.assert_allclose(state[1].divisor_gamma, gamma, rtol=1e-6)


def large():
    """Parameters of which a sample is looked at; their rows and columns differ."""
    w = draw(0, 300, 256) * np.exp(draw(1, 300, 1) / 20) * np.exp(draw(2, 1, 256) / 20)
    grads = {"w": w.astype(np.float32), "v": draw(3, 70_000), "b": draw(4, 1000)}
    hessian = {name: draw(5 + g.ndim, *g.shape) ** 2 for name, g in grads.items()}
    return grads, hessian


def test_large_parameters_hold_the_share_within_a_few_standard_deviations():
    grads, hessian = large()
    for fraction in (0.1, 0.2, 0.5):
        _, state = one_step(held(hold_unclipped(fraction)), grads, hessian, grads)
        metrics = sophia_metrics(state)
        bound = 4 * np.sqrt(fraction * (1 - fraction) / 2048)
        for name in grads:
            share = metrics[f"unclipped_fraction/{name}"]
            assert share == pytest.approx(fraction, abs=bound), name
        assert metrics["unclipped_fraction/b"] == pytest.approx(fraction)  # all looked at


def test_all_counts_a_sampled_entry_for_as_many_as_it_stands_for():
    """A large parameter of small ratios next to a small one of large ratios."""
    grads, hessian = large()
    grads["v"] = grads["v"] / 1e6
    _, state = one_step(held(hold_unclipped(0.6, per="all")), grads, hessian, grads)
    assert unclipped_fraction(state) == pytest.approx(0.6, abs=0.03)


def test_the_sample_covers_every_row_and_every_column_evenly():
    """A stride through a flat parameter may stay in one column; half of the rows differ."""
    for axis, shape in [
        (0, (2048, 128)),
        (1, (2048, 128)),
        (0, (16, 4, 256)),
        (0, (9999,)),
    ]:
        grads = np.ones(shape, np.float32)
        of_axis = np.arange(shape[axis]) < shape[axis] // 2
        grads[(slice(None),) * axis + (of_axis,)] = 1e-3
        for fraction, gamma in ((0.48, 1e-3), (0.52, 1.0)):
            tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(fraction))
            _, state = one_step(tx, grads, np.ones_like(grads), grads)
            np.testing.assert_allclose(state.divisor_gamma, [[gamma]], rtol=1e-6)


def test_the_sample_covers_rows_and_columns_together():
    """Not along a diagonal, which covers each of them evenly too."""
    row, column = np.mgrid[:256, :256]
    grads = np.where(row > column, 1e-3, 1.0).astype(np.float32)
    for fraction, gamma in ((0.47, 1e-3), (0.53, 1.0)):
        tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(fraction))
        _, state = one_step(tx, grads, np.ones_like(grads), grads)
        np.testing.assert_allclose(state.divisor_gamma, [[gamma]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gamma_is_one_of_the_ratios_to_the_last_bit(dtype):
    """Updates and average in the same 16 bits too, which the stage alone may get."""
    grads = jnp.array([1, 2, 4, 8], dtype)
    tx = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(0.5), hessian_dtype=dtype)
    updates, state = one_step(tx, grads, jnp.ones(4, dtype), grads)
    np.testing.assert_array_equal(state.divisor_gamma, [[4]])
    np.testing.assert_array_equal(updates.astype(jnp.float32), [0.25, 0.5, 1, 2])


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["in"])
    return jnp.mean((hidden @ params["out"] + params["bias"] - jnp.sin(x[:, :2])) ** 2)


X = jnp.asarray(draw(11, 16, 5))
TRAINED = {"in": draw(12, 5, 8) / 9, "out": draw(13, 8, 2) / 9, "bias": jnp.zeros(2)}


def train(tx, scale=lambda name: 1.0, steps=7):
    """Parameters after some steps with Hutchinson's estimates, multiplied by `scale`."""

    @jax.jit
    def step(params, state):
        def estimate(key):
            hessian = hutchinson(loss_fn)(params, X, key=key)
            return {name: scale(name) * h for name, h in hessian.items()}

        grads = jax.grad(loss_fn)(params, X)
        updates, state = tx.update(grads, state, params, hessian_fn=estimate)
        return optax.apply_updates(params, updates), state

    params, state = TRAINED, tx.init(TRAINED)
    for _ in range(steps):
        params, state = step(params, state)
    return params


HELD = {"gamma": hold_unclipped(0.4), "update_interval": 2, "b1": 0.8, "b2": 0.9}


@pytest.mark.parametrize("mode", [{}, {"nesterov": True}, {"hessian_dtype": "bfloat16"}])
def test_the_scale_of_the_estimates_changes_nothing(mode):
    """Powers of two, one for each parameter, not even by a bit."""
    tx = sophia_h(0.02, **HELD | mode)
    usual = train(tx)
    powers = {"in": 2.0**-20, "out": 2.0**13, "bias": 0.125}
    assert_trees_all_equal(train(tx, powers.get), usual)
    if not mode:
        for factor in (1e-3, 1e3):
            assert_trees_all_close(
                train(tx, lambda _, factor=factor: factor), usual, rtol=1e-3
            )
        constant = sophia_h(0.02, **HELD | {"gamma": 0.01})
        assert abs(train(constant, powers.get)["in"] - train(constant)["in"]).max() > 0.01


def test_debias_and_the_start_of_the_average_change_nothing():
    tx = sophia_h(0.02, **HELD)
    assert_trees_all_equal(train(sophia_h(0.02, debias=True, **HELD)), train(tx))
    # The first h is (1 - b2) ĥ: a fiftieth, a half, or all of the estimate.
    firsts = [
        one_step(held(hold_unclipped(0.4), b2=b2), TRAINED, TRAINED, TRAINED)[0]
        for b2 in (0.0, 0.5, 0.98)
    ]
    for first in firsts[1:]:
        assert_trees_all_close(first, firsts[0], rtol=1e-5)


def layered(rule):
    """Five steps of a network of three layers, which a scan runs through, or a list has."""
    layers = [{"w": draw(20 + i, 40, 60) / 30, "b": draw(30 + i, 60)} for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(draw(14, 8, 40))

    def apply(layer, x):
        return jnp.tanh(x @ layer["w"] + layer["b"])[:, :40]

    def scanned(params):
        return jnp.mean(jax.lax.scan(lambda x, p: (apply(p, x), None), x, params)[0] ** 2)

    def unscanned(params):
        out = x
        for layer in params:
            out = apply(layer, out)
        return jnp.mean(out**2)

    def losses(loss_fn, params, stacked):
        tx = sophia_g(0.01, gamma=rule(stacked), weight_decay=0.0)

        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            estimate = jax.tree.map(lambda g: 100 * g**2 + 1e-9, grads)
            updates, state = tx.update(grads, state, params, hessian=estimate)
            return optax.apply_updates(params, updates), state, loss

        state, found = tx.init(params), []
        for _ in range(5):
            params, state, loss = step(params, state)
            found.append(loss)
        return np.array(found)

    return losses(scanned, stack, True), losses(unscanned, layers, None)


def test_stacked_layers_train_as_layers_of_a_list():
    scanned, unscanned = layered(lambda stacked: hold_unclipped(0.3, stacked=stacked))
    np.testing.assert_allclose(scanned, unscanned, rtol=1e-5)
    together, _ = layered(lambda stacked: hold_unclipped(0.3))
    assert abs(together - unscanned).max() > 1e-3


@pytest.mark.parametrize(
    "stacked", [{"w": True, "b": False}, lambda tree: {"w": True, "b": False}]
)
def test_a_stack_beside_what_is_none(stacked):
    """In the same state, whatever their first axes are: longer, shorter, or as long."""
    grads = {"w": draw(0, 4, 50), "b": {"long": draw(1, 60), "short": draw(2, 3, 9)}}
    hessian = jax.tree.map(lambda g: np.square(g[::-1]) + 1e-3, grads)
    tx = held(hold_unclipped(0.3, stacked=stacked))
    updates, state = one_step(tx, grads, hessian, grads)
    apart = {"w": list(grads["w"]), "b": grads["b"]}
    apart_h = {"w": list(hessian["w"]), "b": hessian["b"]}
    expected, by_layer = one_step(held(hold_unclipped(0.3)), apart, apart_h, apart)
    assert_trees_all_equal({"w": list(updates["w"]), "b": updates["b"]}, expected)
    metrics, of_layers = sophia_metrics(state), sophia_metrics(by_layer)
    for name in ("long", "short"):
        for what in ("gamma", "unclipped_fraction"):
            assert metrics[f"{what}/b/{name}"] == of_layers[f"{what}/b/{name}"]
    gammas = [float(of_layers[f"gamma/w/{layer}"]) for layer in range(4)]
    assert metrics["gamma/w"] == pytest.approx(np.median(gammas))


@pytest.mark.parametrize("per", ["parameter", "all"])
def test_what_has_no_quantile_is_finite(per):
    """Zeros, a dead parameter, a scalar, nothing at all, and curvature below zero."""
    grads = {
        "alive": draw(0, 9),
        "dead": np.zeros(5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "negative": draw(1, 6),
        "scalar": np.float32(-3),
    }
    hessian = {name: np.abs(g) for name, g in grads.items()}
    hessian["dead"] = np.array([0, 0, 1, 1, -1], np.float32)
    hessian["negative"] = -hessian["negative"]
    tx = held(hold_unclipped(0.2, per=per))
    zeros = jax.tree.map(np.zeros_like, grads)
    sign = jax.tree.map(np.sign, grads)
    # Before the first refresh, and with estimates of zeros: momentum with a sign.
    assert_trees_all_equal(one_step(tx, grads, None, grads)[0], sign)
    assert_trees_all_equal(one_step(tx, grads, zeros, grads)[0], sign)
    # No gradient at all, with and without curvature.
    assert_trees_all_equal(one_step(tx, zeros, hessian, grads)[0], zeros)
    assert_trees_all_equal(one_step(tx, zeros, zeros, grads)[0], zeros)
    updates, state = one_step(tx, grads, hessian, grads)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    np.testing.assert_array_equal(updates["dead"], 0)
    np.testing.assert_array_equal(updates["negative"], sign["negative"])
    if per == "parameter":
        assert updates["scalar"] == -1  # its own quantile: a whole step
    assert sophia_metrics(state)["unclipped_fraction/empty"] == 0


def test_one_optimizer_with_and_without_x64():
    tx = held(hold_unclipped(0.5))
    update = jax.jit(tx.update)
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            results.append(update(GRADS, tx.init(PARAMS), PARAMS, hessian=HESSIAN)[0])
    assert_trees_all_equal(*results)


def test_no_parameters_at_all():
    for per in ("parameter", "all"):
        updates, _ = one_step(held(hold_unclipped(per=per)), {}, {}, {})
        assert updates == {}


def test_the_share_is_of_what_the_clip_leaves():
    for clip_threshold in (0.5, 4.0):
        tx = held(hold_unclipped(0.2), clip_threshold=clip_threshold)
        grads, hessian = large()
        updates, state = one_step(tx, grads, hessian, grads)
        assert unclipped_fraction(state) == pytest.approx(0.2, abs=0.02)
        usual, _ = one_step(held(hold_unclipped(0.2)), grads, hessian, grads)
        scaled = optax.tree.scale(clip_threshold, usual)
        assert_trees_all_close(updates, scaled, rtol=1e-6, atol=1e-6)


def test_a_clip_at_zero_moves_nothing():
    grads, hessian = {"w": draw(0, 9)}, {"w": np.abs(draw(1, 9)) * (np.arange(9) > 1)}
    updates, _ = one_step(held(hold_unclipped(), clip_threshold=0.0), grads, hessian, grads)
    np.testing.assert_array_equal(updates["w"], 0)


def test_a_stack_of_no_layers_leaves_the_others_their_gamma():
    grads = {"none": np.zeros((0, 3), np.float32), "w": draw(0, 9)}
    rule = hold_unclipped(stacked={"none": True, "w": False})
    updates, _ = one_step(held(rule), grads, grads, grads)
    alone, _ = one_step(held(hold_unclipped()), grads, grads, grads)
    np.testing.assert_array_equal(updates["w"], alone["w"])


FLAGS = {"w": True, "b": False, "s": False}


@pytest.mark.parametrize(
    "stacked", [FLAGS, lambda tree: {name: FLAGS[name] for name in tree}]
)
def test_the_state_is_mapped_as_parameters_are(stacked):
    tx = held(hold_unclipped(stacked=stacked))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert_trees_all_equal(
        mapped[1].hessian, jax.tree.map(lambda h: h + 1, state[1].hessian)
    )
    np.testing.assert_array_equal(mapped[1].divisor_gamma, state[1].divisor_gamma)


def test_the_fraction_may_be_injected_and_scheduled():
    def make(fraction):
        return sophia_g(0.1, gamma=hold_unclipped(fraction))

    tx = optax.inject_hyperparams(make)(fraction=0.1)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for fraction in (0.1, 0.5):
        state = state._replace(hyperparams={"fraction": jnp.float32(fraction)})
        updates, new = update(GRADS, state, PARAMS, hessian=HESSIAN)
        expected, _ = make(fraction).update(
            GRADS, state.inner_state, PARAMS, hessian=HESSIAN
        )
        assert_trees_all_close(updates, expected, rtol=1e-6)
    assert update._cache_size() == 1
    scheduled = make(lambda count: 0.1 + 0.4 * count)
    state = scheduled.init(PARAMS)
    for fraction in (0.1, 0.5):
        updates, new = scheduled.update(GRADS, state, PARAMS, hessian=HESSIAN)
        expected, _ = make(fraction).update(GRADS, state, PARAMS, hessian=HESSIAN)
        assert_trees_all_close(updates, expected, rtol=1e-6)
        state = new


def test_bad_arguments_are_told():
    for fraction in (-0.1, 1.5, np.float32(2), float("nan")):
        with pytest.raises(ValueError, match=r"`fraction` is the share .* between 0 and 1"):
            hold_unclipped(fraction)
    with pytest.raises(ValueError, match=r"`per` must be \"parameter\" or \"all\""):
        hold_unclipped(per="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`stacked` says which layers"):
        hold_unclipped(per="all", stacked=True)
    tx = sophia_g(0.1, gamma=hold_unclipped(stacked=True))
    with pytest.raises(ValueError, match=r"`stacked` is True for `params\['s'\]`.* \(\)"):
        tx.init(PARAMS)
    tx = sophia_g(0.1, gamma=hold_unclipped(stacked={"w": True}))
    with pytest.raises(ValueError, match=r"`stacked` .* prefix"):
        tx.init(PARAMS)


def test_with_nesterov_the_share_is_of_what_is_divided():
    """Of the average one step later, made of what is kept of it."""
    grads, hessian = large()
    for dtype in (None, "bfloat16"):
        tx = held(hold_unclipped(0.2), b1=0.8, nesterov=True, mu_dtype=dtype)
        by_hand = scale_by_diag_hessian(b2=0.0, gamma=hold_unclipped(0.2))
        state, inner = tx.init(grads), by_hand.init(grads)
        for scale in (1.0, -3.0):
            step = jax.tree.map(lambda g, s=scale: s * g[::-1], grads)
            # Not compiled: in 16 bits XLA may compute in more of them than asked for.
            updates, state = tx.update(step, state, grads, hessian=hessian)
            wide = jax.tree.map(lambda m: m.astype(jnp.float32), state[0].ema)
            ahead = jax.tree.map(lambda m, g: 0.8 * m + (1 - 0.8) * g, wide, step)
            divided, inner = by_hand.update(ahead, inner, grads, hessian=hessian)
            expected = jax.tree.map(lambda u: np.clip(u, -1, 1), divided)
            assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_needs_no_memory_beside_the_state(nesterov):
    """Read from the compiled step: nothing as large as a parameter."""
    params = {"w": jnp.zeros((512, 1024)), "v": jnp.zeros((64, 512))}
    tx = sophia_g(0.1, gamma=hold_unclipped(), nesterov=nesterov)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < params["v"].nbytes
