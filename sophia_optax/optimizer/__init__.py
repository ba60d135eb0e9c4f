"""State and updates: from gradients, and estimates of the curvature as they come, to steps.

diag_hessian      the average of estimates, and the division by it
hold_unclipped    the rule by which gamma finds itself
quantile          of |u| / h, from a sample: what that rule reads
scale_by_sophia   the average of gradients, that division, the clip
sophia            with weight decay and learning rate: what a user calls
received          what `update` receives as an estimate, checked
rounding          averages in 16 bits
metrics           figures computed from the state
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
