"""sophia = scale_by_sophia . add_decayed_weights . scale_by_learning_rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sophia_optax.arrays import AxisName
from sophia_optax.curvature import hutchinson
from sophia_optax.optimizer.estimate_checks import HessianFn, is_masked
from sophia_optax.optimizer.hold_unclipped import HoldUnclipped
from sophia_optax.optimizer.scale_by_sophia import scale_by_sophia

Mask = Any | Callable[[optax.Params], Any] | None


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule | HoldUnclipped = 0.05,
    eps: jax.typing.ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Mask = None,
    *,
    clip_threshold: jax.typing.ArrayLike = 1.0,
    update_interval: jax.typing.ArrayLike = 10,
    debias: bool = False,
    nesterov: bool = False,
    mu_dtype: Any = None,
    hessian_dtype: Any = None,
    seed: jax.typing.ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia, for any estimate of the Hessian diagonal.

    .. math::
      \theta_t = \theta_{t-1} - \eta\,(\mathrm{clip}(
        m_t / \max(\gamma h_t, \epsilon), \pm\rho) + \lambda \theta_{t-1})

    A chain of `scale_by_sophia`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`. Pass `hessian_fn` (or `hessian`) to `update`, as
    `scale_by_diag_hessian` explains: if no update gets an estimate, this reduces to sign
    momentum (Signum). Compile the step with `jax.jit`: outside it, JAX compiles a new
    `hessian_fn` at every step.

    Args:
      learning_rate: η, or a schedule of it. Without weight decay, no entry changes by more
        than η `clip_threshold` in a step.
      b1: decay of the moving average of gradients.
      b2: decay of the moving average of the Hessian, per refresh.
      gamma: the rule `hold_unclipped`; or the scale of the Hessian, a number or a schedule,
        chosen so that `unclipped_fraction` is between 0.1 and 0.5.
      eps: the smallest divisor.
      weight_decay: λ, decoupled, multiplied by the learning rate as in AdamW.
      mask: where weight decay applies: a tree of booleans, a prefix of the tree of
        parameters, or a function from the parameters to such a tree.
      clip_threshold: ρ, the largest magnitude of an entry before the learning rate.
      update_interval: number of updates from one refresh to the next.
      debias: correct the bias of the average of the Hessian. It has no effect with
        `hold_unclipped`.
      nesterov: divide b1 m_t + (1 - b1) g_t instead of m_t, as `optax.adamw` does.
      mu_dtype: dtype of the average of gradients, by default that of the parameters. In
        bfloat16 it takes half the memory and is rounded stochastically. Under
        `optax.inject_hyperparams` write the name, such as "bfloat16", here and below.
      hessian_dtype: dtype of the average of the Hessian, by default float32. In bfloat16 it
        is rounded stochastically too.
      seed: seed of the keys for `hessian_fn` and of the stochastic rounding.
      axis_name: inside `shard_map` and `pmap`, name or names of the mapped axes along which
        parameters are sharded, as for `scale_by_diag_hessian`.

    Returns:
      A transformation whose updates have the dtype of the parameters.

    Raises:
      ValueError: as `scale_by_diag_hessian`.

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
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule | HoldUnclipped = 0.05,
    eps: jax.typing.ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Mask = None,
    *,
    clip_threshold: jax.typing.ArrayLike = 1.0,
    update_interval: jax.typing.ArrayLike = 10,
    debias: bool = False,
    nesterov: bool = False,
    mu_dtype: Any = None,
    hessian_dtype: Any = None,
    seed: jax.typing.ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Sophia-G: `sophia` with the paper's settings for `gnb`, and the same arguments.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax import gnb, sophia_g
      >>> def logits_fn(params, x):
      ...     return x @ params
      >>> def loss_fn(params, x, y):
      ...     logits = logits_fn(params, x)
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      ...     return losses.mean()
      >>> x, y = jnp.eye(4), jnp.array([1, 2, 0, 1])
      >>> params, estimate = jnp.zeros((4, 3)), gnb(logits_fn)
      >>> tx = sophia_g(learning_rate=0.1)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
      ...     updates, state = tx.update(
      ...         grads, state, params, hessian_fn=lambda key: estimate(params, x, key=key)
      ...     )
      ...     return optax.apply_updates(params, updates), state, loss
      >>> for _ in range(30):
      ...     params, state, loss = step(params, state)
      >>> print(bool(loss < 0.2))
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
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    gamma: optax.ScalarOrSchedule | HoldUnclipped = 0.01,
    eps: jax.typing.ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    mask: Mask = None,
    *,
    clip_threshold: jax.typing.ArrayLike = 1.0,
    update_interval: jax.typing.ArrayLike = 10,
    debias: bool = False,
    nesterov: bool = False,
    mu_dtype: Any = None,
    hessian_dtype: Any = None,
    seed: jax.typing.ArrayLike = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Sophia-H: `sophia` with the paper's settings for `hutchinson`.

    Its `update` also takes `obj_fn`, a function from the parameters to the loss, as
    `optax.contrib.sophia` does. This is short for
    `hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)`. The arguments are the same
    as for `sophia`.

    Raises:
      ValueError: as `scale_by_diag_hessian`; and if `update` gets `obj_fn` together with
        an estimate, without `params`, or where `optax.masked` hides some of `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax import sophia_h
      >>> def loss_fn(params):
      ...     return jnp.sum(params**4)
      >>> tx = sophia_h(0.1, b1=0.5, b2=0.5, gamma=1.0, weight_decay=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, obj_fn=loss_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(50):
      ...     params, state = step(params, state)
      >>> print(bool(loss_fn(params) < 0.1))
      True

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
            extra_args["hessian_fn"] = _hessian_fn_of(obj_fn, params, extra_args)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _hessian_fn_of(
    obj_fn: Callable[[optax.Params], jax.Array],
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> HessianFn:
    """Return the `hessian_fn` that estimates the Hessian of `obj_fn` at `params`."""
    for name in ("hessian", "hessian_fn"):
        if extra_args.get(name) is not None:
            raise ValueError(
                f"`update` got both `obj_fn` and `{name}`. `obj_fn` is turned into a "
                "`hessian_fn` by `hutchinson`: pass one of them."
            )
    if params is None:
        raise ValueError(
            "`obj_fn` needs the parameters, got `params=None`: call "
            "`update(grads, state, params, obj_fn=obj_fn)`."
        )
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "`obj_fn` is a function of all parameters, but `optax.masked` or "
            "`optax.partition` hides some of them. Pass "
            "`hessian_fn=lambda key: hutchinson(obj_fn)(params, key=key)` with all "
            "parameters instead: the estimate is reduced to the mask."
        )
    return lambda key: hutchinson(obj_fn)(params, key=key)
