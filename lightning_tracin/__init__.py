"""Which training examples, and which words in them, made the model say this? TracIn-WE for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tracin.bridge.mixin import TracInMixin
    from lightning_tracin.past.trace import Trace
    from lightning_tracin.querying.influence import influence, self_influence
    from lightning_tracin.querying.label_review import label_issues
    from lightning_tracin.querying.trainer import InfluenceTrainerMixin, Trainer
    from lightning_tracin.recording.callback import TracInCallback
    from lightning_tracin.results.corrections import apply_corrections
    from lightning_tracin.results.result import InfluenceResult
    from lightning_tracin.scoring.methods import TracInLast, TracInLayer, TracInSum, TracInWE
    from lightning_tracin.scoring.ridge import TracInRidge

__version__ = "0.1.0"

__all__ = [
    "InfluenceResult",
    "InfluenceTrainerMixin",
    "TracInCallback",
    "TracInLast",
    "TracInLayer",
    "TracInMixin",
    "TracInRidge",
    "TracInSum",
    "TracInWE",
    "Trace",
    "Trainer",
    "apply_corrections",
    "influence",
    "label_issues",
    "self_influence",
]

# Each name's module is imported when the name is asked for: Lightning alone takes seconds, which the command line
# would spend on every `--help`.
_MODULES = {
    "InfluenceResult": "results.result",
    "InfluenceTrainerMixin": "querying.trainer",
    "TracInCallback": "recording.callback",
    "TracInLast": "scoring.methods",
    "TracInLayer": "scoring.methods",
    "TracInMixin": "bridge.mixin",
    "TracInRidge": "scoring.ridge",
    "TracInSum": "scoring.methods",
    "TracInWE": "scoring.methods",
    "Trace": "past.trace",
    "Trainer": "querying.trainer",
    "apply_corrections": "results.corrections",
    "influence": "querying.influence",
    "label_issues": "querying.label_review",
    "self_influence": "querying.influence",
}


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            globals()[name] = getattr(import_module(f"lightning_tracin.{_MODULES[name]}"), name)
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
