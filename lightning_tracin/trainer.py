"""The Trainer with ``influence`` and ``self_influence``."""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_tracin.loop import InfluenceTrainerMixin


class Trainer(InfluenceTrainerMixin, pl.Trainer):
    """``pytorch_lightning.Trainer`` with two more methods, :meth:`influence` and :meth:`self_influence`.

    It overrides nothing. For ``lightning.pytorch``, put :class:`~lightning_tracin.loop.InfluenceTrainerMixin` before
    ``lightning.pytorch.Trainer``, or call :func:`lightning_tracin.influence` with a trainer of either package.
    """
