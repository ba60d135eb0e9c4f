"""Variants of Sophia: the paper's baselines and ablations, and alternatives to clipping.

Variants are composed of public transformations. Their arguments mean the same as those of
`sophia`, and `update` receives estimates in the same way. JAX's type promotion determines
the dtype of the updates.
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
