"""Estimators of the Hessian diagonal: pure functions, independent of the optimizer."""
