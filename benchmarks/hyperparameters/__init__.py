"""What learning the hyperparameters costs, and how well its gradients are known."""

import sgdgp  # noqa: F401  (first: importing GPyTorch itself prints what KeOps lacks)
