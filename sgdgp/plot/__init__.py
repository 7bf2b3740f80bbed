"""Figures of posteriors and solves, with matplotlib: ``pip install 'sgdgp[plot]'``.

Each function draws into ``ax``, by default into a new figure, and returns the axes.
Several calls may draw into the same ones. Figures of class probabilities are in
``sgdgp.plot.networks``.
"""

from sgdgp.plot import networks
from sgdgp.plot.coverage import calibration
from sgdgp.plot.functions import posterior, slice
from sgdgp.plot.solves import convergence

__all__ = ["calibration", "convergence", "networks", "posterior", "slice"]
