"""Estimates of the Hessian's diagonal: pure functions that know no optimizer.

gauss_newton   `gnb` and `empirical_fisher`, squares of gradients
hutchinson     products of the Hessian with random signs
accumulate     the estimate of a batch that comes in micro-batches
likelihoods    what labels are drawn from; `inverse_cdf` draws the classes
each_group     the place in a model where gradients are squared; `marks` checks it
groups         a batch split into groups, and the sum over them
meshes         what `jit` knows of sharded arrays
mapped_axes    what `pmap` and `shard_map` need
"""

from sophia_optax.curvature.accumulate import accumulate
from sophia_optax.curvature.each_group import each_group
from sophia_optax.curvature.gauss_newton import empirical_fisher, gnb
from sophia_optax.curvature.hutchinson import hutchinson
from sophia_optax.curvature.likelihoods import Bernoulli, Categorical, Normal, Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "Normal",
    "Poisson",
    "accumulate",
    "each_group",
    "empirical_fisher",
    "gnb",
    "hutchinson",
]
