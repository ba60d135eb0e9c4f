"""sophia = scale_by_sophia . add_decayed_weights . scale_by_learning_rate."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike

from sophia_optax.arrays import AxisName
from sophia_optax.curvature import hutchinson
from sophia_optax.optimizer.estimate_checks import HessianFn, has_masked
from sophia_optax.optimizer.hold_unclipped import Gamma
from sophia_optax.optimizer.scale_by_sophia import scale_by_sophia

Mask = Any | Callable[[optax.Params], Any] | None


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.965,
    b2: ArrayLike = 0.99,
    gamma: Gamma = 0.05,
    eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Mask = None,
    *,
    clip_threshold: ArrayLike = 1.0,
    update_interval: ArrayLike = 10,
    debias: bool = False,
    nesterov: bool = False,
    mu_dtype: Any = None,
    hessian_dtype: Any = None,
    seed: ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia, for any estimate of the Hessian diagonal.

    .. math::
      \theta_t = \theta_{t-1} - \eta\,(\mathrm{clip}(
        m_t / \max(\gamma h_t, \epsilon), \pm\rho) + \lambda \theta_{t-1})

    This is a chain of `scale_by_sophia`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`. Pass `hessian_fn` or `hessian` to `update`, as described
    in `scale_by_diag_hessian`. Without any estimate this reduces to sign momentum (Signum).
    Compile the step with `jax.jit`: outside it, JAX compiles `hessian_fn` at every step.

    Args:
      learning_rate: η, or a schedule of it. Without weight decay, no entry changes by more
        than η `clip_threshold` in a step.
      b1: decay of the moving average of gradients.
      b2: decay of the moving average of the Hessian, per refresh.
      gamma: the scale of the Hessian, a number or a schedule, chosen so that
        `unclipped_fraction` is between 0.1 and 0.5; or the rule `hold_unclipped`.
      eps: the smallest divisor.
      weight_decay: λ, decoupled, multiplied by the learning rate as in AdamW.
      mask: where weight decay applies: a tree of booleans, a prefix of the tree of
        parameters, or a function from the parameters to such a tree.
      clip_threshold: ρ, the largest magnitude of an entry before the learning rate.
      update_interval: number of updates from one refresh to the next.
      debias: correct the bias of the average of the Hessian.
      nesterov: divide b1 m_t + (1 - b1) g_t instead of m_t, as `optax.adamw` does.
      mu_dtype: dtype of the average of gradients, by default that of the parameters. In
        bfloat16 it takes half the memory and is rounded stochastically.
      hessian_dtype: as for `scale_by_diag_hessian`.
      seed: as for `scale_by_diag_hessian`.
      axis_name: as for `scale_by_diag_hessian`.

    Returns:
      A transformation whose updates have the dtype of the parameters.

    Raises:
      ValueError, TypeError: as `scale_by_diag_hessian`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sophia_optax import sophia
      >>> tx = sophia(0.1, b1=0.5, gamma=1.0, weight_decay=0.0, debias=True)
      >>> params, hessian = jnp.array([1.0, -3.0]), jnp.array([2.0, 20.0])
      >>> state = tx.init(params)
      >>> for _ in range(100):  # of the loss ½ Σ hessian · params²
      ...     grads = hessian * params
      ...     updates, state = tx.update(grads, state, params, hessian=hessian)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.all(jnp.abs(params) < 0.1)))
      True

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithm 3
    """
    return optax.chain(
        scale_by_sophia(
            b1, b2, gamma, eps, clip_threshold=clip_threshold,
            update_interval=update_interval, debias=debias, nesterov=nesterov,
            mu_dtype=mu_dtype, hessian_dtype=hessian_dtype, seed=seed, axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def sophia_g(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: Gamma = 0.05, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Mask = None, *,
    clip_threshold: ArrayLike = 1.0, update_interval: ArrayLike = 10,
    debias: bool = False, nesterov: bool = False, mu_dtype: Any = None,
    hessian_dtype: Any = None, seed: ArrayLike = 0, axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Sophia-G: `sophia` with the paper's settings for `gnb`, and the same arguments.

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
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(params), state, params,
      ...         hessian_fn=lambda key: estimate(params, x, key=key),
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> print(bool(loss_fn(params) < 0.2))
      True

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithms 2, 3
    """
    return sophia(
        learning_rate, b1, b2, gamma, eps, weight_decay, mask,
        clip_threshold=clip_threshold, update_interval=update_interval, debias=debias,
        nesterov=nesterov, mu_dtype=mu_dtype, hessian_dtype=hessian_dtype, seed=seed,
        axis_name=axis_name,
    )  # fmt: skip


def sophia_h(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike = 0.965, b2: ArrayLike = 0.99,
    gamma: Gamma = 0.01, eps: ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2, mask: Mask = None, *,
    clip_threshold: ArrayLike = 1.0, update_interval: ArrayLike = 10,
    debias: bool = False, nesterov: bool = False, mu_dtype: Any = None,
    hessian_dtype: Any = None, seed: ArrayLike = 0, axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Sophia-H: `sophia` with the paper's settings for `hutchinson`.

    The arguments are the same as for `sophia`. As in `optax.contrib.sophia`, `update` also
    takes `obj_fn`, a function from the parameters to the loss, which stands for
    `hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`.

    Raises:
      ValueError: as `sophia`. Also from `update`, if it gets `obj_fn` with an estimate,
        without `params`, or with `params` that `optax.masked` hides in part.

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

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, Algorithms 1, 3
    """
    tx = sophia(
        learning_rate, b1, b2, gamma, eps, weight_decay, mask,
        clip_threshold=clip_threshold, update_interval=update_interval, debias=debias,
        nesterov=nesterov, mu_dtype=mu_dtype, hessian_dtype=hessian_dtype, seed=seed,
        axis_name=axis_name,
    )  # fmt: skip

    def update(updates, state, params=None, *, obj_fn=None, **extra_args):
        if obj_fn is not None:
            extra_args["hessian_fn"] = _make_hessian_fn(obj_fn, params, extra_args)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _make_hessian_fn(obj_fn: Any, params: Any, extra_args: dict[str, Any]) -> HessianFn:
    """Return the `hessian_fn` that estimates the Hessian of `obj_fn` at `params`."""
    for name in ("hessian", "hessian_fn"):
        if extra_args.get(name) is not None:
            raise ValueError(
                f"`update` got both `obj_fn` and `{name}`, two estimates: pass one of them."
            )
    if params is None:
        raise ValueError(
            "`obj_fn` needs the parameters, got `params=None`: call "
            "`update(grads, state, params, obj_fn=obj_fn)`."
        )
    if has_masked(params):
        raise ValueError(
            "`obj_fn` needs all parameters, but `optax.masked` or `optax.partition` hides "
            "some of them. Pass, with all parameters, "
            "`hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`."
        )
    return lambda key: hutchinson(obj_fn)(params, key=key)
