"""pyoptim: accelerated, drop-in optimizers for PyTorch."""

from pyoptim._version import __version__
from pyoptim.adagrad import Adagrad
from pyoptim.adam import Adam, AdamW
from pyoptim.backend import BackendError, use_backend
from pyoptim.rmsprop import RMSprop
from pyoptim.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BackendError",
    "RMSprop",
    "__version__",
    "use_backend",
]
