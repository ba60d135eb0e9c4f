"""State and updates: the chain of transformations that turns gradients into updates.

momentum          the moving average of gradients
diag_hessian      the moving average of estimates, and the division by it
hold_unclipped    the rule for gamma
sophia            the chain of these stages, the clip, weight decay and learning rate
estimate_checks   checks of the estimate that `update` receives
rounding          stochastic rounding for averages in 16 bits
metrics           metrics computed from the state
"""
