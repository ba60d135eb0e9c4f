"""Sophia with the full Hessian and the clip in its eigenbasis, for theory."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def full_matrix_sophia(
    learning_rate: optax.ScalarOrSchedule = 0.5, clip_threshold: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The deterministic Sophia of the paper's theory, for small problems.

    .. math::
      \theta_t = \theta_{t-1} - \eta V^\top \mathrm{clip}(
        V (\nabla^2 L)^{-1} \nabla L, \pm\rho), \qquad \nabla^2 L = V^\top \Lambda V

    The number of steps does not grow with the condition number of the Hessian. If an
    eigenvalue is not positive, the step along its eigenvector is a sign.

    Args:
      learning_rate: η, or a schedule of it.
      clip_threshold: ρ, the largest magnitude of an entry in the eigenbasis.

    Returns:
      A transformation of one vector, shape (n,), whose `update` requires `hessian`, the
      full matrix, shape (n, n).

    Raises:
      ValueError: from `update`, for other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sophia_optax.variants import full_matrix_sophia
      >>> def loss_fn(params):
      ...     return (params[0] + params[1]) ** 2 + 1e4 * (params[0] - params[1]) ** 2
      >>> tx, params = full_matrix_sophia(), jnp.array([2.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     grads, hessian = jax.grad(loss_fn)(params), jax.hessian(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, hessian=hessian)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(loss_fn(params) < 1e-4))
      True

    References:
      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, section 4
    """

    def update(updates, state, params=None, *, hessian, **extra_args):
        del params, extra_args
        if jnp.ndim(updates) != 1 or jnp.shape(hessian) != 2 * jnp.shape(updates):
            raise ValueError(
                "`hessian` must have shape (n, n) for a gradient of shape (n,), got "
                f"{jnp.shape(hessian)} for {jnp.shape(updates)}. Flatten the parameters."
            )
        eigenvalues, basis = jnp.linalg.eigh(hessian)
        bound = jnp.asarray(clip_threshold)
        tiny = jnp.finfo(eigenvalues.dtype).tiny
        steps = basis.T @ updates / jnp.maximum(eigenvalues, tiny)
        return basis @ jnp.clip(steps, -bound, bound), state

    def init(params):
        return optax.EmptyState()

    return optax.chain(
        optax.GradientTransformationExtraArgs(init, update),  # pyright: ignore
        optax.scale_by_learning_rate(learning_rate),
    )
