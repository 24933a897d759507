"""Taking the gradients of a Lightning module's batches: what a fit, a query and a validation do alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_tracin.bridge.mixin import losses_of
from lightning_tracin.bridge.unmoved import module_unmoved, random_state_kept
from lightning_tracin.gradients.capture import Captured, capture, learn_layouts
from lightning_tracin.gradients.eval_mode import gradients_enabled
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.layouts import Layout
from lightning_tracin.gradients.losses import Losses
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.predictions import PredictionProbe
from lightning_tracin.gradients.sites import Site, words_site
from lightning_tracin.parallel.fsdp import is_fsdp


class ModuleGradients:
    """Takes the gradients of a module's batches at some sites.

    What a batch tells of the layers is remembered for those that follow; the first one is checked.

    Args:
        module: the module.
        wanted: the sites that gradients are taken at.
        recorded: the sites of the trace; of its words the token ids are read, also where no gradient is taken there.
        probe: sees what the model says in the forward pass that gives the losses.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        wanted: Sequence[Site],
        *,
        recorded: Sequence[Site] = (),
        probe: PredictionProbe | None = None,
    ) -> None:
        self.module = module
        self.sites = tuple(wanted)
        self._own_losses = losses_of(module)
        self._losses = self._own_losses if probe is None else probe.watching(self._own_losses)
        words = words_site(recorded)
        self._read = () if words is None or words in self.sites else (words,)
        self.layouts: dict[nn.Module, Layout] = {}

    def at(self, wanted: Sequence[Site], probe: PredictionProbe) -> ModuleGradients:
        """What takes gradients at some of the sites, and knows already what batches told here."""
        narrower = ModuleGradients(self.module, wanted, recorded=self.sites, probe=probe)
        narrower.layouts = self.layouts
        return narrower

    @property
    def is_new(self) -> bool:
        """Whether no batch has come yet."""
        return not self.layouts

    def check_mean(self, batch: Any) -> None:
        """Check on a batch that a module without losses of single examples returns their mean.

        Gradients of a mean do not show which position belongs to which example, so that is learned here, too.

        Raises:
            ValueError: if it returns anything else.
        """
        if isinstance(self._own_losses, MeanLoss):
            self._own_losses.check(batch)
            self.layouts |= self._own_losses.layouts(batch, self._layers)

    def learn_layouts(self, batch: Any, losses: Losses | None = None) -> None:
        """Learn from a batch where the examples are in the layers' calls, by a pass of its own, as FSDP needs it.

        Args:
            batch: the module's.
            losses: others in the place of the module's own.
        """
        layers = [layer for each in sites_on_module(self.module, self.sites) for layer in each.layers]
        learn_layouts(losses or self._losses, batch, layers, self.layouts, independent=self._is_independent)

    def capture(self, batch: Any, losses: Losses | None = None) -> Captured:
        """The gradients of a batch's examples, inside of :func:`inside_fit` or of ``gradients_enabled``.

        Args:
            batch: the module's.
            losses: others in the place of the module's own.

        Raises:
            ValueError: if a mean of them is taken over the labels of the batch, and its examples have some more.
        """
        if isinstance(self._own_losses, MeanLoss):
            self._own_losses.check_new(batch)
        fsdp = is_fsdp(self.module)
        reading = () if fsdp else sites_on_module(self.module, self._read)
        return capture(
            losses or self._losses,
            batch,
            sites_on_module(self.module, self.sites),
            reading_layers=[layer for each in reading for layer in each.layers],
            layouts=self.layouts,
            module=None if fsdp else self.module,
            independent=self._is_independent,
            passes=0 if fsdp else None,
        )

    @property
    def _layers(self) -> list[nn.Module]:
        """The layers of all sites that a batch is read or differentiated at."""
        sites = sites_on_module(self.module, (*self.sites, *self._read))
        return [layer for each in sites for layer in each.layers]

    @property
    def _is_independent(self) -> bool:
        """Whether single losses are known, so that it can be checked that they do not depend on each other."""
        return not isinstance(self._own_losses, MeanLoss)


@contextmanager
def inside_fit(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Compute gradients between two training batches without a trace in training.

    No random number is drawn from it, and what forward passes, ``training_step`` and batch hooks change beside the
    weights is put back, such as learning rates.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    with (
        random_state_kept(),
        gradients_enabled(module),
        module_unmoved(module, datamodule, trainer),
        trainer.precision_plugin.predict_step_context(),
    ):
        yield
