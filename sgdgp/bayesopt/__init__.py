"""Bayesian optimisation with posterior sample functions.

``maximise`` finds the maximum of every function at once; ``thompson_sampling`` is the
loop around it.
"""

from sgdgp.bayesopt.functions import Functions
from sgdgp.bayesopt.maximise import Maxima, maximise, maximize
from sgdgp.bayesopt.record import Step
from sgdgp.bayesopt.thompson import Result, thompson_sampling

__all__ = [
    "Functions",
    "Maxima",
    "Result",
    "Step",
    "maximise",
    "maximize",
    "thompson_sampling",
]
