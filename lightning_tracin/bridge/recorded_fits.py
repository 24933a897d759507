"""What the fits of each trainer have recorded. It is kept with the trainer.

A callback may be given to another trainer, whose fit then is its last; and one that ``configure_callbacks`` returns is
made anew for each fit, test and prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_tracin.bridge.training_set import RecordedFit

_ATTRIBUTE = "_lightning_tracin_fits"


@dataclass(frozen=True)
class KeptFit:
    """A fit of a trainer.

    Attributes:
        fit: what was recorded.
        module: a weak reference to the module that was trained.
        state: of the callback when the fit was over, with which the next one goes on; empty before.
    """

    fit: RecordedFit
    module: Any
    state: dict[str, Any] = field(default_factory=dict)


class _Fits(dict[str, KeptFit]):
    """The last fit of a trainer by the ``state_key`` of the callback that recorded it; no other process has it."""

    def __reduce__(self) -> tuple[type[_Fits], tuple[()]]:
        return _Fits, ()


def kept_fits(trainer: Any) -> dict[str, KeptFit]:
    """The last fits of a trainer by the ``state_key`` of the callbacks that recorded them."""
    fits: dict[str, KeptFit] = trainer.__dict__.setdefault(_ATTRIBUTE, _Fits())
    return fits


def recorded_fit_of(trainer: Any, callback: Any) -> RecordedFit | None:
    """What a callback, or one that it replaces, recorded of a trainer's last fit; else of its last fit anywhere."""
    kept = kept_fits(trainer).get(callback.state_key)
    return getattr(callback, "recorded_fit", None) if kept is None else kept.fit
