"""State and updates: the chain of transformations that turns gradients into updates.

momentum          the moving average of gradients
diag_hessian      the moving average of estimates, and the division by it
hold_unclipped    the rule for gamma
scale_by_sophia   the chain of these stages and the clip
sophia            the chain with weight decay and learning rate, and its aliases
estimate_checks   checks of the estimate that `update` receives
rounding          stochastic rounding for averages in 16 bits
metrics           metrics computed from the state
"""

from sophia_optax.optimizer.diag_hessian import scale_by_diag_hessian
from sophia_optax.optimizer.hold_unclipped import hold_unclipped
from sophia_optax.optimizer.metrics import sophia_metrics, unclipped_fraction
from sophia_optax.optimizer.scale_by_sophia import scale_by_sophia
from sophia_optax.optimizer.sophia import sophia, sophia_g, sophia_h

__all__ = [
    "hold_unclipped",
    "scale_by_diag_hessian",
    "scale_by_sophia",
    "sophia",
    "sophia_g",
    "sophia_h",
    "sophia_metrics",
    "unclipped_fraction",
]
