"""Sophia for Optax: an optimizer chain, and estimators of the Hessian's diagonal.

The two halves know nothing of each other. The optimizer is three stages,

    sophia          = scale_by_sophia . add_decayed_weights . scale_by_learning_rate
    scale_by_sophia = ema(b1) . scale_by_diag_hessian(b2, gamma, eps) . clip

      m_t = b1 m_{t-1} + (1 - b1) g_t                        optax.ema
      h_t = b2 h_{t-1} + (1 - b2) ĥ_t   on a refresh         scale_by_diag_hessian
      u_t = m_t / max(gamma h_t, eps)                        scale_by_diag_hessian
      Δθ  = -lr (clip(u_t, ±1) + wd θ)                       optax.clip, ...

and an estimator is a pure function `(params, *batch, key) -> ĥ`, a tree like `params`.
They meet in one keyword argument of `update`:

    tx.update(grads, state, params, hessian_fn=lambda key: estimate(params, x, key=key))

Words, used alike everywhere here:

  Hessian        ∇²L, the matrix of second derivatives of the mean loss L
  Gauss-Newton   (generalised) Jᵀ (∂²ℓ/∂f²) J, averaged over predictions: the Hessian
                 without the curvature of the model f itself, so never negative
  refresh        an update that takes in a new estimate ĥ
  prediction     one term of the mean loss: a token, for a language model
  group          a part of the batch whose gradients are summed before the square

Source: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer
for Language Model Pre-training", arXiv 2305.14342.
"""

from sophia_optax.curvature import (
    Bernoulli,
    Categorical,
    Normal,
    Poisson,
    accumulate,
    each_group,
    empirical_fisher,
    gnb,
    hutchinson,
)
from sophia_optax.optimizer import (
    hold_unclipped,
    scale_by_diag_hessian,
    scale_by_sophia,
    sophia,
    sophia_g,
    sophia_h,
    sophia_metrics,
    unclipped_fraction,
)

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "Normal",
    "Poisson",
    "accumulate",
    "each_group",
    "empirical_fisher",
    "gnb",
    "hold_unclipped",
    "hutchinson",
    "scale_by_diag_hessian",
    "scale_by_sophia",
    "sophia",
    "sophia_g",
    "sophia_h",
    "sophia_metrics",
    "unclipped_fraction",
]
