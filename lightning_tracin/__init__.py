"""Which training examples, and which words in them, made the model say this? TracIn-WE for PyTorch Lightning."""

from lightning_tracin.callback import TracInCallback
from lightning_tracin.loop import influence
from lightning_tracin.methods import TracInLast, TracInWE
from lightning_tracin.mixin import TracInMixin
from lightning_tracin.result import InfluenceResult
from lightning_tracin.trace import Trace
from lightning_tracin.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "InfluenceResult",
    "TracInCallback",
    "TracInLast",
    "TracInMixin",
    "TracInWE",
    "Trace",
    "Trainer",
    "influence",
]
