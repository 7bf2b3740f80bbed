"""The figure of the landing page: ``python docs/_static/posterior.py`` makes it."""

from pathlib import Path

import gpytorch
import matplotlib
import torch
from PIL import Image

import sgdgp

matplotlib.use("Agg")
from matplotlib import pyplot


class Model(gpytorch.models.ExactGP):
    """A zero mean and a Matern-5/2 kernel."""

    def __init__(self, x, y):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.MaternKernel(nu=2.5)
        )

    def forward(self, x):
        """The prior at x."""
        mean, covariance = self.mean_module(x), self.covar_module(x)
        return gpytorch.distributions.MultivariateNormal(mean, covariance)


torch.manual_seed(3)
x = torch.rand(1500, 1) * 10
x = x[(x[:, 0] < 4) | (x[:, 0] > 6.5)][:400]
y = torch.sin(1.6 * x[:, 0]) + 0.3 * torch.sin(7 * x[:, 0])
y = y + 0.15 * torch.randn(len(y))
model = Model(x, y)
sgdgp.fit(model, steps=100)
posterior = sgdgp.condition(model, num_samples=64, seed=0)

new = torch.linspace(-0.5, 10.5, 500).unsqueeze(1)
with torch.no_grad():
    mean, deviation = posterior.mean(new), posterior.variance(new).sqrt()
    functions = posterior.samples(new)[:6]

figure, axes = pyplot.subplots(figsize=(8, 2.8), dpi=120, layout="constrained")
points = new[:, 0]
axes.fill_between(
    points, mean - 2 * deviation, mean + 2 * deviation, color="#cfe3f5", lw=0
)
axes.plot(points, functions.T, color="#5b8db8", lw=0.7)
axes.plot(points, mean, color="#0b3c64", lw=1.6)
axes.plot(x[:, 0], y, ".", color="#d1495b", ms=2.5, alpha=0.6)
axes.set(xlim=(-0.5, 10.5), xticks=[], yticks=[])
axes.spines[:].set_visible(False)
path = Path(__file__).with_suffix(".png")
figure.savefig(path)
Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
