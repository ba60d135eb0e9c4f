"""Estimates of the Hessian diagonal: pure functions, independent of the optimizer.

estimator            the protocol, and checks of the arguments that all estimators take
gauss_newton         `gnb` and `empirical_fisher`: squared gradients
hutchinson           `hutchinson`: Hessian-vector products with random signs
accumulate           the estimate of a batch that arrives in micro-batches
likelihoods          distributions of labels
categorical_sampler  sampling of classes from logits
groups               the split of a batch into groups, and the sum over groups
each_group           the annotation of gathered weights
check_annotations    the check of these annotations
meshes               Explicit and Auto axes under `jit`
"""
