"""pyoptim: accelerated, drop-in optimizers for PyTorch."""

from pyoptim import coreset, lr_scheduler, reweight
from pyoptim._version import __version__
from pyoptim.adagrad import Adagrad
from pyoptim.adam import Adam, AdamW
from pyoptim.adamp import AdamP
from pyoptim.amp import GradScaler
from pyoptim.backend import BackendError, use_backend
from pyoptim.expectigrad import Expectigrad
from pyoptim.line_search import SLS, AdaSLS, SaLSa
from pyoptim.norms import clip_grad_norm_, row_sums, tensor_norms, total_norm
from pyoptim.rmsprop import RMSprop
from pyoptim.sam import SAM, frozen_batch_norm
from pyoptim.sgd import SGD
from pyoptim.sgdp import SGDP

__all__ = [
    "SAM",
    "SGD",
    "SGDP",
    "SLS",
    "AdaSLS",
    "Adagrad",
    "Adam",
    "AdamP",
    "AdamW",
    "BackendError",
    "Expectigrad",
    "GradScaler",
    "RMSprop",
    "SaLSa",
    "__version__",
    "clip_grad_norm_",
    "coreset",
    "frozen_batch_norm",
    "lr_scheduler",
    "reweight",
    "row_sums",
    "tensor_norms",
    "total_norm",
    "use_backend",
]
