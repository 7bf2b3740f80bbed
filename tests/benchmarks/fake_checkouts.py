"""Tiny checkouts with the entry points of published codes, in NumPy or torch.

Each solves K + noise I exactly, so that a test sees whether the system, its scale and
the weights' layout cross over as they should.
"""

from pathlib import Path

_KERNEL = """
import numpy as np

def kernel(x, y, lengthscale, scale=1.0):
    x, y = np.asarray(x) / lengthscale, np.asarray(y) / lengthscale
    s = np.sqrt(3.0 * ((x[:, None] - y) ** 2).sum(-1))
    return scale**2 * (1.0 + s) * np.exp(-s)

def solved(x, rhs, lengthscale, noise):
    k = kernel(x, x, lengthscale)
    return np.linalg.solve(k + noise * np.eye(len(k)), np.asarray(rhs))
"""

_JAX = {
    "jax/__init__.py": "block_until_ready = tuple",
    "jax/numpy.py": "from numpy import *",
    "jax/random.py": "PRNGKey = int",
    "optax.py": """
import wandb
class sgd:
    def __init__(self, learning_rate, momentum, nesterov):
        assert nesterov and momentum == 0.9
    def init(self, parameters):
        return 0 * parameters
""",
}

_SGD_GP = {
    "scalable_gps/kernels.py": """
class Matern32Kernel:
    def __init__(self, config):
        self.config = config
    def kernel_fn(self, x, y):
        from exact import kernel
        return kernel(x, y, self.config["length_scale"], self.config["signal_scale"])
""",
    "scalable_gps/utils.py": """
from collections import namedtuple
from uci_datasets import all_datasets
TargetTuple = namedtuple("TargetTuple", ["error_target", "regularizer_target"])
""",
    "scalable_gps/optim_utils.py": """
import numpy as np
class Waits(np.ndarray):
    def block_until_ready(self):
        return self
def get_stochastic_gradient_fn(x, kernel_fn, noise_scale, variant):
    assert variant == "batch_all"
    return kernel_fn(x, x) + noise_scale**2 * np.eye(len(x))
def get_update_fn(gradient, optimizer, polyak, vmap_and_pmap):
    assert vmap_and_pmap and 0 < polyak <= 1
    def update(weights, average, idx, features, state, targets):
        exact = np.linalg.solve(gradient, targets.error_target[0].T).T[None]
        return weights, (0.5 * (average + exact)).view(Waits), state
    return update
def get_idx_fn(size, n, iterative_idx, share_idx):
    return lambda i, key: np.arange(size)
""",
}

_ITERATIVE_GP = {
    "structs.py": """
from collections import namedtuple
KernelParams = namedtuple("KernelParams", ["signal_scale", "length_scale"])
Dataset = namedtuple("Dataset", ["x", "y", "N", "D"])
ModelParams = namedtuple("ModelParams", ["noise_scale", "kernel_params"])
""",
    "kernels.py": """
import numpy as np
from exact import kernel
matern32_kernel_grad_fn = matern32_feature_params_fn = None
def matern32_kernel_fn(x, y, p):
    return kernel(x, y, p.length_scale, p.signal_scale)
def feature_vec_prod(x, p, features, w, batch_size):
    return np.sin(x.sum(1))[:, None] * w
""",
    "gradient_estimators.py": """
import numpy as np
from types import SimpleNamespace
from kernels import feature_vec_prod, matern32_kernel_fn
def pathwise_gradient(train_state, model_params, ds, solver, rtol_y):
    p, w = model_params.kernel_params, np.ones(4)
    k = matern32_kernel_fn(ds.x, ds.x, p) + model_params.noise_scale**2 * np.eye(ds.N)
    b = np.column_stack([ds.y, feature_vec_prod(ds.x, p, None, w, 1)])
    v = np.linalg.solve(k, b)
    return SimpleNamespace(v0=v, feature_params=None, w=w), None
""",
    "mll_optimiser.py": """
from functools import partial
import wandb
from structs import KernelParams, ModelParams
def fit(ds, test, kernel, kernel_grad, features, gradient, solver, cfg):
    assert not cfg.log_verbose and cfg.warm_start and cfg.n_iterations > 0
    gradient, noise = partial(gradient, ds=ds, solver=solver, rtol_y=cfg.rtol_y), 0.5
    p = KernelParams(cfg.signal_scale_init, [cfg.length_scale_init] * ds.D)
    for i in range(cfg.n_iterations):
        gradient(train_state=None, model_params=ModelParams(noise, p))
        noise *= 1 - cfg.learning_rate
""",
    "linear_solvers.py": """
import wandb
import numpy as np
from exact import solved
def cg_solver(v0, targets, model_params, x, kernel_fn, rtol_y, rtol_z, max_epochs,
              batch_size):
    assert kernel_fn.__name__ == "matern32_kernel_fn"
    p = model_params.kernel_params
    v = solved(x, targets, p.length_scale, model_params.noise_scale**2)
    # It ends a little early, and comes nearer when asked for more.
    return v * (1.0 + 1.5 * rtol_y), 3, rtol_y, rtol_z
ap_solver = sgd_solver = cg_solver
""",
}

_RLAOPT = {
    "rlaopt/__init__.py": "from . import _C",
    "rlaopt/kernels.py": """
from types import SimpleNamespace as KernelConfig
class Matern32LinOp:
    row_oracle = blk_oracle = None
    def __init__(self, x, y, config):
        self.x, self.lengthscale = x, config.lengthscale
""",
    "rlaopt/models/__init__.py": "from rlaopt.models.linsys import LinSys",
    "rlaopt/models/linsys.py": """
class LinSys:
    def __init__(self, A, B, reg, A_row_oracle, A_blk_oracle):
        self.A, self.B, self.reg = A, B, reg
""",
    "rlaopt/preconditioners.py": "from types import SimpleNamespace as NystromConfig",
    "rlaopt/solvers.py": """
from types import SimpleNamespace
import torch
from exact import solved
PCGConfig = SAPConfig = SAPAccelConfig = SimpleNamespace
class _get_solver:
    def __init__(self, model, W_init, config):
        self.model, self.W = model, W_init
        acceleration = getattr(config, "accel_config", None)
        assert acceleration is None or acceleration.mu * acceleration.nu <= 1
    def _step(self):
        a = self.model.A
        exact = solved(a.x, self.model.B, a.lengthscale.numpy(), self.model.reg)
        self.W = 0.5 * (self.W + torch.from_numpy(exact))
""",
}

_FILES = {
    "sgd-gp": {**_JAX, **_SGD_GP},
    "iterative-gp": {**_JAX, **_ITERATIVE_GP},
    "rlaopt": _RLAOPT,
}


def fake_checkout(folder: Path, name: str) -> Path:
    """Write the checkout of that name into a folder of its own."""
    root = folder / name
    for file, text in {"exact.py": _KERNEL, **_FILES[name]}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root
