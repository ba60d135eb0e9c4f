"""The Sophia optimizer as a chain of Optax transformations, applied left to right.

sophia          = scale_by_sophia . add_decayed_weights . scale_by_learning_rate
scale_by_sophia = ema(b1) . scale_by_diag_hessian(b2, gamma, eps) . clip(1)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sophia_optax.arrays import AxisName
from sophia_optax.curvature.hutchinson import hutchinson
from sophia_optax.optimizer.diag_hessian import scale_by_diag_hessian
from sophia_optax.optimizer.estimate_checks import has_masked
from sophia_optax.optimizer.hold_unclipped import Gamma, HoldUnclipped, hold_unclipped
from sophia_optax.optimizer.momentum import momentum


def sophia(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: Gamma = 0.05, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None, *,
    clip_threshold: ArrayLike = 1.0, update_interval: ArrayLike = 10,
    debias: bool = False, nesterov: bool = False, mu_dtype: Any = None,
    hessian_dtype: Any = None, seed: ArrayLike = 0, axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""The Sophia optimizer, algorithm 3 of `Sophia <https://arxiv.org/abs/2305.14342>`_.

    .. math::
      \theta_t = \theta_{t-1} - \eta\,(\mathrm{clip}(
        m_t / \max(\gamma h_t, \epsilon), \pm\rho) + \lambda \theta_{t-1})

    This is a chain of `scale_by_sophia`, `optax.add_decayed_weights`,
    `optax.scale_by_learning_rate` and a cast to the dtypes of `params`. Pass `hessian_fn`
    or `hessian` to `update`, as described in `scale_by_diag_hessian`. Without any estimate,
    this reduces to sign momentum (Signum). Compile the training step with `jax.jit`:
    otherwise JAX compiles `hessian_fn` at every step. `sophia_g` is an alias of `sophia`.

    Args:
      learning_rate: η, a number or schedule.
      b1: decay rate of m, the moving average of gradients.
      b2: decay rate per refresh of h, the moving average of the Hessian diagonal.
      gamma: γ, the scale of the Hessian: a number, schedule or `hold_unclipped(fraction)`.
        The default is for `gnb`. Tune a constant gamma so that `unclipped_fraction`, which
        increases with gamma, is between 0.1 and 0.5.
      eps: ε, the lower bound of the divisor.
      weight_decay: λ, decoupled weight decay, multiplied by the learning rate as in AdamW.
      mask: where weight decay applies: a tree of booleans that is a prefix of the tree of
        parameters, or a function from the parameters to such a tree.
      clip_threshold: ρ, the largest magnitude of an entry before weight decay and scaling.
      update_interval: number of updates from one call of `hessian_fn` to the next.
      debias: whether to correct bias as Adam does: divide h by `1 - b2 ** refreshes`.
        Otherwise h is too small in about the first `update_interval / (1 - b2)` updates.
        This has no effect with `hold_unclipped`.
      nesterov: whether to replace m_t in the update by b1 m_t + (1 - b1) g_t, Nesterov's
        look-ahead, as in `optax.adamw`.
      mu_dtype: dtype of m, by default the dtype of the parameters. Averages in 16 bits are
        rounded stochastically.
      hessian_dtype: dtype of h, by default float32. Under `optax.inject_hyperparams`, pass
        the name of a dtype, such as "bfloat16".
      seed: seed of the keys for `hessian_fn` and of the stochastic rounding.
      axis_name: inside `shard_map` and `pmap`, name or names of the mapped axes along which
        parameters are sharded. All devices then accept or reject an estimate together, and
        `hold_unclipped` chooses one gamma for all devices. With None, devices are
        independent. Under `jit` with sharded arrays, use None.

    Returns:
      A transformation. Its `update` requires `params` and returns updates in the dtypes of
      `params`. The errors are the same as for `scale_by_diag_hessian`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax import gnb, sophia_g
      >>> x, y = jnp.eye(4), jnp.array([1, 2, 0, 1])
      >>> def loss_fn(params):
      ...     return -jax.nn.log_softmax(x @ params)[jnp.arange(4), y].mean()
      >>> estimate, tx = gnb(lambda params, x: x @ params), sophia_g(learning_rate=0.1)
      >>> params = jnp.zeros((4, 3))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss_fn)(params)
      ...     hessian_fn = lambda key: estimate(params, x, key=key)
      ...     updates, state = tx.update(grads, state, params, hessian_fn=hessian_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> print(bool(loss_fn(params) < 0.2))
      True
    """
    return optax.chain(
        scale_by_sophia(
            b1, b2, gamma, eps, clip_threshold=clip_threshold,
            update_interval=update_interval, debias=debias, nesterov=nesterov,
            mu_dtype=mu_dtype, hessian_dtype=hessian_dtype, seed=seed, axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(_cast_like_params),
    )  # fmt: skip


sophia_g = sophia
"""Sophia-G: `sophia` for estimates of `gnb`."""


def sophia_h(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: Gamma = 0.01, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Any = None, *,
    clip_threshold: ArrayLike = 1.0, update_interval: ArrayLike = 10,
    debias: bool = False, nesterov: bool = False, mu_dtype: Any = None,
    hessian_dtype: Any = None, seed: ArrayLike = 0, axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Sophia-H: `sophia` with the paper's gamma for estimates from `hutchinson`.

    As in `optax.contrib.sophia`, `update` also takes `obj_fn`, a function from the full
    tree of parameters to the loss. Passing `obj_fn` is short for
    `hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax import sophia_h
      >>> tx = sophia_h(0.1, b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0)
      >>> def loss_fn(params):
      ...     return jnp.sum(params**4)
      >>> params = jnp.array([1.0, 2.0])
      >>> grads = jax.grad(loss_fn)(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params, obj_fn=loss_fn)
      >>> print(updates.round(4))  # -learning_rate * 4 params³ / (12 params²)
      [-0.0333 -0.0667]
    """
    tx = sophia(
        learning_rate, b1, b2, gamma, eps, weight_decay, mask,
        clip_threshold=clip_threshold, update_interval=update_interval, debias=debias,
        nesterov=nesterov, mu_dtype=mu_dtype, hessian_dtype=hessian_dtype, seed=seed,
        axis_name=axis_name,
    )  # fmt: skip

    def update(updates, state, params=None, *, obj_fn=None, **extra_args):
        if obj_fn is not None:
            _check_obj_fn(params, extra_args)
            extra_args["hessian_fn"] = lambda key: hutchinson(obj_fn)(params, key=key)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_obj_fn(params: optax.Params | None, extra_args: dict[str, Any]) -> None:
    """Raise ValueError if `obj_fn` conflicts with an argument or `params` is missing."""
    for name in ("hessian", "hessian_fn"):
        if extra_args.get(name) is not None:
            raise ValueError(f"`update` got both `obj_fn` and `{name}`: pass one of them.")
    if params is None:
        raise ValueError("`obj_fn` needs the parameters, but `params` is None.")
    if has_masked(params):
        raise ValueError(
            "`obj_fn` needs all parameters, but `optax.masked` or `optax.partition` hides "
            "some. Pass `hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`."
        )


def scale_by_sophia(
    b1: ArrayLike = 0.965, b2: ArrayLike = 0.99, gamma: Gamma = 0.05,
    eps: ArrayLike = 1e-12, *, clip_threshold: ArrayLike = 1.0,
    update_interval: ArrayLike = 10, debias: bool = False, nesterov: bool = False,
    mu_dtype: Any = None, hessian_dtype: Any = None, seed: ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    r"""Sophia without weight decay and without the factor -learning_rate.

    .. math::
      m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
      u_t = \mathrm{clip}(m_t / \max(\gamma h_t, \epsilon), \pm\rho)

    This is a chain of `optax.ema`, `scale_by_diag_hessian` and `optax.clip`. The arguments,
    dtypes and errors are the same as for `sophia`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sophia_optax import scale_by_sophia
      >>> tx = optax.chain(scale_by_sophia(b1=0.0, b2=0.0), optax.scale(-0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> grads, hessian = jnp.array([2.0, 2.0]), jnp.array([1.0, 80.0])
      >>> updates, state = tx.update(grads, tx.init(params), params, hessian=hessian)
      >>> print(updates)
      [-0.1  -0.05]
    """
    # clip(m / max(gamma h, eps), ±ρ) = ρ clip(m / max(ρ gamma h, ρ eps), ±1)
    return optax.chain(
        momentum(b1, nesterov=nesterov, dtype=mu_dtype, seed=seed),
        scale_by_diag_hessian(
            b2, _scale_gamma(gamma, clip_threshold), clip_threshold * eps,
            update_interval=update_interval, debias=debias, hessian_dtype=hessian_dtype,
            seed=seed, axis_name=axis_name,
        ),
        optax.clip(1.0),
        _scale(clip_threshold),
    )  # fmt: skip


def _cast_like_params(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Cast the updates to the dtypes of the parameters."""

    def cast(u: Any, p: Any) -> Any:
        return None if u is None else u.astype(jnp.result_type(p))

    return jax.tree.map(cast, updates, params, is_leaf=lambda u: u is None)


def _scale_gamma(gamma: Any, factor: ArrayLike) -> Any:
    """Return factor · gamma, or a `hold_unclipped` rule unchanged: it needs no factor."""
    if isinstance(gamma, HoldUnclipped | str | dict) or gamma is hold_unclipped:
        return gamma  # `scale_by_diag_hessian` rejects invalid values
    if callable(gamma):
        return lambda count: factor * jnp.asarray(gamma(count), jnp.float32)
    return factor * gamma


def _scale(factor: ArrayLike) -> optax.GradientTransformation:
    """Return a variant of `optax.scale(factor)` that keeps the dtype of the updates."""

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates)

    return optax.stateless(scale)
