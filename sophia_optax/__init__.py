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

from sophia_optax._accumulate import accumulate
from sophia_optax._diag_hessian import scale_by_diag_hessian
from sophia_optax._gauss_newton import empirical_fisher, gnb
from sophia_optax._hutchinson import hutchinson
from sophia_optax._likelihoods import Bernoulli, Categorical, Normal, Poisson
from sophia_optax._metrics import sophia_metrics, unclipped_fraction
from sophia_optax._scale_by_sophia import scale_by_sophia
from sophia_optax._sophia import sophia, sophia_g, sophia_h

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "Normal",
    "Poisson",
    "accumulate",
    "empirical_fisher",
    "gnb",
    "hutchinson",
    "scale_by_diag_hessian",
    "scale_by_sophia",
    "sophia",
    "sophia_g",
    "sophia_h",
    "sophia_metrics",
    "unclipped_fraction",
]
