"""Compositions of public stages: the paper's baselines and ablations, and other bounds.

Arguments, and how `update` receives an estimate, are those of `sophia`. Updates have the
dtype of JAX's type promotion.
"""

from sophia_optax.variants.bounds import gradient_noise, noise_bounded, smooth_clip
from sophia_optax.variants.paper import (
    adahessian,
    adahessian_clip,
    clip_only,
    empirical_fisher_clip,
    full_matrix_sophia,
    normalize_only,
    signum,
    spatial_average,
)

__all__ = [
    "adahessian", "adahessian_clip", "clip_only", "empirical_fisher_clip",
    "full_matrix_sophia", "gradient_noise", "noise_bounded", "normalize_only", "signum",
    "smooth_clip", "spatial_average",
]  # fmt: skip
