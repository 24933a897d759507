"""Which training examples, and which words in them, made the model say this? TracIn-WE for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Each name's module is imported when the name is asked for: Lightning alone takes seconds, which the command line
# would spend on every `--help`.
_MODULES = {
    "InfluenceResult": "result",
    "TracInCallback": "callback",
    "TracInLast": "methods",
    "TracInMixin": "mixin",
    "TracInWE": "methods",
    "Trace": "trace",
    "Trainer": "trainer",
    "influence": "loop",
}


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            globals()[name] = getattr(import_module(f"lightning_tracin.{_MODULES[name]}"), name)
            return globals()[name]
        if name in _MODULES.values():
            return import_module(f"lightning_tracin.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
