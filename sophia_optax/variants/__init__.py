"""The paper's baselines and ablations, each a composition of public stages.

What Sophia is compared with, and what is left of it when a part is taken out:

  adahessian             Hutchinson's estimates, the root of their average square, no clip
  adahessian_clip        AH+clip: the same root, in Sophia
  empirical_fisher_clip  E-F+clip: squares of the gradients of the true labels, in Sophia
  clip_only              Sophia where the Hessian is one
  normalize_only         the average of gradients, scaled to one length
  signum                 SignGD with momentum: Sophia where the Hessian is zero
  full_matrix_sophia     the theory: the whole Hessian, and the clip in its eigenbasis

AdamW and Lion are Optax's. Estimates reach `update` as they reach `sophia`'s.

Sources: Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, and section 4;
Yao et al., `AdaHessian <https://arxiv.org/abs/2006.00719>`_, 2020.
"""

from sophia_optax.variants.ablations import (
    adahessian_clip,
    clip_only,
    empirical_fisher_clip,
    normalize_only,
    signum,
)
from sophia_optax.variants.adahessian import adahessian, spatial_average
from sophia_optax.variants.full_matrix import full_matrix_sophia

__all__ = [
    "adahessian",
    "adahessian_clip",
    "clip_only",
    "empirical_fisher_clip",
    "full_matrix_sophia",
    "normalize_only",
    "signum",
    "spatial_average",
]
