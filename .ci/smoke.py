"""A small posterior with the installed wheel and nothing but its requirements."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gpytorch
import torch

import sgdgp


class ExactGP(gpytorch.models.ExactGP):
    """A constant mean and a scaled RBF kernel."""

    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        """The prior at x."""
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


package = Path(sgdgp.__file__).parent
assert package.is_relative_to(sys.prefix), f"not the wheel: {package}"
assert (package / "py.typed").is_file(), "py.typed is not in the wheel"
assert sgdgp.__version__ == metadata.version("sgdgp")

x = torch.linspace(0, 1, 50)[:, None]
model = ExactGP(x, torch.sin(6 * x[:, 0]), gpytorch.likelihoods.GaussianLikelihood())
posterior = sgdgp.condition(model, num_samples=4, seed=0)
assert posterior.samples(x[:5]).shape == (4, 5)
assert posterior.variance(x).ge(0).all()

network = torch.nn.Sequential(
    torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
uncertain = sgdgp.networks.linearise(network.eval(), sgdgp.networks.Gaussian()).fit(
    [(x, torch.sin(6 * x))], steps=1, final_samples=4
)
assert uncertain.predict(x[:5]).variance.gt(0).all()

result = sgdgp.bayesopt.thompson_sampling(
    lambda x: torch.sin(6 * x[:, 0]),
    torch.tensor([[0.0], [1.0]]),
    initial=20,
    steps=1,
    batch=4,
    model=model,
    progress=False,
)
assert len(result.y) == 24

asked = subprocess.run(
    [Path(sys.executable).with_name("sgdgp")],
    capture_output=True,
    text=True,
    check=False,
)
assert asked.returncode == 1, asked
assert "sgdgp[cli]" in asked.stderr, asked

refused = ""
try:
    import sgdgp.botorch
except ImportError as error:
    refused = str(error)
assert "sgdgp[botorch]" in refused, "BoTorch is no requirement, and was imported"
print(f"sgdgp {sgdgp.__version__} from {package}: {posterior.solution.reason}")
