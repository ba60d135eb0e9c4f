"""The paper's baselines and ablations, each a composition of public stages.

  adahessian             Hutchinson's estimates, the root of their mean square, no clip
  adahessian_clip        AH+clip: Sophia with the root of the mean square
  empirical_fisher_clip  E-F+clip: Sophia with squared gradients of the true labels
  clip_only              Sophia with a Hessian of one
  normalize_only         the average of gradients, scaled to a fixed norm
  signum                 SignGD with momentum: Sophia with a Hessian of zero
  full_matrix_sophia     the theory: the full Hessian, and the clip in its eigenbasis

AdamW and Lion are in Optax. Pass estimates to `update` as for `sophia`.

Sources: Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, section 4;
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
