"""Is the posterior right: Hessian-free variances, aligned HMC, compact posteriors."""
