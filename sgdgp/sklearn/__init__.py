"""scikit-learn's habits around sgdgp: ``SGDGPRegressor``."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sgdgp.sklearn needs scikit-learn; install it with pip install 'sgdgp[sklearn]'"
    ) from error

from sgdgp.sklearn.model import KERNEL_NAMES
from sgdgp.sklearn.regressor import SGDGPRegressor

__all__ = ["KERNEL_NAMES", "SGDGPRegressor"]
