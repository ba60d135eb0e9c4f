"""`sophia_optax`: the Sophia optimizer for Optax, and estimators of the Hessian diagonal.

The subpackage `optimizer` chains Optax transformations, which apply from left to right:

    sophia          = scale_by_sophia . add_decayed_weights . scale_by_learning_rate
    scale_by_sophia = ema(b1) . scale_by_diag_hessian(b2, gamma, eps) . clip(1)

      m_t = b1 m_{t-1} + (1 - b1) g_t                        optax.ema
      h_t = b2 h_{t-1} + (1 - b2) ĥ_t   on a refresh         scale_by_diag_hessian
      u_t = m_t / max(gamma h_t, eps)                        scale_by_diag_hessian
      Δθ  = -lr (clip(u_t, ±1) + wd θ)                       optax.clip, ...

The subpackage `curvature` contains estimators: pure functions `(params, *batch, key) -> ĥ`,
where ĥ is a tree like `params`. Pass an estimator to `update` as a function of the key:

    tx.update(grads, state, params, hessian_fn=lambda key: estimate(params, x, key=key))

Glossary:

  Hessian        ∇²L, the matrix of second derivatives of the mean loss L
  Gauss-Newton   the (generalized) Gauss-Newton matrix Jᵀ (∂²ℓ/∂f²) J with J = ∂f/∂θ,
                 averaged over predictions with loss ℓ and model output f(θ). It is the
                 Hessian of L if f is linearized in θ, and it is positive semidefinite
  refresh        an optimizer update that accepts a new estimate ĥ
  prediction     one term of the mean loss: for a language model, one token
  group          a part of the batch whose gradients are summed before they are squared

Source: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer
for Language Model Pre-training", arXiv 2305.14342.
"""

from sophia_optax.curvature.accumulate import accumulate
from sophia_optax.curvature.each_group import each_group
from sophia_optax.curvature.estimator import Estimator
from sophia_optax.curvature.gauss_newton import empirical_fisher, gnb
from sophia_optax.curvature.hutchinson import hutchinson
from sophia_optax.curvature.likelihoods import Bernoulli, Categorical, Normal, Poisson
from sophia_optax.optimizer.diag_hessian import scale_by_diag_hessian
from sophia_optax.optimizer.hold_unclipped import hold_unclipped
from sophia_optax.optimizer.metrics import sophia_metrics, unclipped_fraction
from sophia_optax.optimizer.sophia import scale_by_sophia, sophia, sophia_g, sophia_h

__version__ = "0.1.0"

__all__ = [
    "Bernoulli", "Categorical", "Estimator", "Normal", "Poisson", "accumulate",
    "each_group", "empirical_fisher", "gnb", "hold_unclipped", "hutchinson",
    "scale_by_diag_hessian", "scale_by_sophia", "sophia", "sophia_g", "sophia_h",
    "sophia_metrics", "unclipped_fraction",
]  # fmt: skip
