"""The gradients of all examples of a batch, captured in one forward and one backward pass.

The forward pass gives the loss of each example, and the backward pass of their sum gives the gradient at the output of
every layer that a site names. Neither needs a parameter that requires a gradient, so weights may be frozen, tied,
quantised or wrapped by LoRA, and no parameter's ``.grad`` changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_tracin.gradients.calls import (
    Call,
    frozen_parameters,
    recorded_calls,
    recording_hook,
    require_called,
    require_dependent,
)
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.layers import SiteLayers
from lightning_tracin.gradients.layouts import Layout, find_layouts, new_layers
from lightning_tracin.gradients.losses import Losses, checked_losses
from lightning_tracin.gradients.positions import linear_positions, word_positions
from lightning_tracin.gradients.sites import Gradients
from lightning_tracin.gradients.texts import IN_SECOND, NO_LABEL, Texts, label_numbers_of, label_sets_of
from lightning_tracin.gradients.word_gradients import WordGradients


@dataclass(frozen=True)
class ReadPositions:
    """Where an embedding layer read P positions.

    Attributes:
        calls: (P,) the call of the layer.
        places: (P,) the place among the ids of that call.
        shapes: of the ids of each call.
    """

    calls: Tensor
    places: Tensor
    shapes: Sequence[torch.Size]

    def marks(self, labels: Tensor | None) -> Tensor:
        """(P,) the mark of each position, see :class:`Texts`; labels (B, T) of the only call's ids (B, T) count."""
        if len(self.shapes) == 2:
            return torch.where(self.calls == 1, IN_SECOND, NO_LABEL)
        marks = torch.full_like(self.places, NO_LABEL)
        if labels is None or labels.is_floating_point() or list(self.shapes) != [labels.shape] or labels.dim() < 2:
            return marks
        own = labels.detach().cpu().reshape(-1)[self.places].long()
        return torch.where(own >= 0, own, marks)


@dataclass(frozen=True)
class Captured:
    """The losses, tokens and gradients of a batch of B examples, on the CPU.

    Attributes:
        losses: (B,) float32.
        token_owners: (P,) the example of each position that the embedding layer read, without padding.
        token_ids: (P,) the token id at each of these positions, in reading order inside an example.
        gradients: the gradients by the key of their site: one row for each word, or factors at linear layers.
        read: where the embedding layer read these positions; None where nothing is known of them.
    """

    losses: Tensor
    token_owners: Tensor
    token_ids: Tensor
    gradients: Mapping[str, Gradients]
    read: ReadPositions | None = None

    def __len__(self) -> int:
        return len(self.losses)

    def not_finite(self) -> Tensor:
        """(B,) whether an example's loss or gradient is NaN or infinite."""
        bad = ~torch.isfinite(self.losses)
        for block in self.gradients.values():
            norms = block.input_norms * block.delta_norms if isinstance(block, FactorGradients) else block.norms
            bad[block.examples[~torch.isfinite(norms)]] = True
        return bad

    def first_not_finite(self) -> int | None:
        """The place in the batch of the first example with a NaN or infinite loss or gradient; None without one."""
        bad = self.not_finite()
        return int(torch.nonzero(bad)[0, 0]) if bool(bad.any()) else None

    def fault(self, example: int) -> str:
        """What of an example is not finite, by its place: its loss, or else its gradient."""
        return "gradient" if bool(torch.isfinite(self.losses[example])) else "loss"

    def without_gradients_of(self, examples: Tensor) -> Captured:
        """The same batch, in which the gradients of some examples, by a mask (B,), are zero."""
        gradients = {key: block.select(~examples[block.examples]) for key, block in self.gradients.items()}
        return replace(self, gradients=gradients)

    def minus(self, other: Captured) -> Captured:
        """The difference of two losses of the same batch, and its gradients."""
        gradients = {key: _difference(block, other.gradients[key]) for key, block in self.gradients.items()}
        return replace(self, losses=self.losses - other.losses, gradients=gradients)

    def texts(self, labels: Tensor | None) -> Texts:
        """The examples' token ids and labels.

        Args:
            labels: one of each example, (B,) or (B, 1), one of each token, or a set, (B, C) of 0 and 1; or None.
        """
        marks = torch.empty(0, dtype=torch.long) if self.read is None else self.read.marks(labels)
        of_examples = None if bool((marks >= 0).any()) else labels
        numbers = label_numbers_of(of_examples, len(self))
        if self.read is None:
            return Texts(len(self), self.token_owners, self.token_ids, numbers)
        sets = label_sets_of(of_examples, len(self))
        return Texts(len(self), self.token_owners, self.token_ids, numbers, marks, sets)


def capture(
    losses: Losses,
    batch: Any,
    sites: Sequence[SiteLayers],
    *,
    reading_layers: Sequence[nn.Module] = (),
    layouts: dict[nn.Module, Layout] | None = None,
    module: nn.Module | None = None,
    independent: bool = True,
    passes: int | None = None,
) -> Captured:
    """The gradients of a batch's examples, from one forward and one backward pass.

    Call it inside :func:`~lightning_tracin.gradients.eval_mode.gradients_enabled`. The results are on the CPU.

    Args:
        losses: the function from a batch to its examples' losses.
        batch: an argument of the module's ``training_step``, on the module's device.
        sites: where gradients are taken, summed over all calls of a site's layers and over all positions.
        reading_layers: embedding layers of which only the token ids are needed.
        layouts: for each layer, where the examples are in its calls, as far as earlier batches determined it; this
            batch adds to it. A batch for which it is empty takes one more backward pass.
        module: the module whose parameters are frozen once ``layouts`` has all layers, so that the graph is smaller;
            None to leave them as they are.
        independent: whether to check, on a batch for which ``layouts`` is empty, that the first example's loss does not
            depend on other examples.
        passes: the number of backward passes to find layouts by, 0 under FSDP; None for as many as are needed.

    Raises:
        ValueError: if the losses are not of shape (B,), if the first example's loss depends on others, or if a layer
            was not called as expected.
    """
    calls: list[Call] = []
    reading_calls: list[Call] = []
    known = {} if layouts is None else layouts
    layers = [layer for site_layers in sites for layer in site_layers.layers]
    frozen = module is not None and all(layer in known for layer in (*layers, *reading_layers))
    with ExitStack() as hooks:
        if module is not None and frozen:
            hooks.enter_context(frozen_parameters(module))
        for site_layers in sites:
            for layer in site_layers.layers:
                hooks.enter_context(recording_hook(layer, calls, cut=site_layers.site.has_words))
        for layer in reading_layers:
            hooks.enter_context(recording_hook(layer, reading_calls, cut=False, differentiate=not frozen))
        per_example = checked_losses(losses(batch))
        calls, reading_calls = list(calls), list(reading_calls)  # copies: recomputation appends to the originals
        require_called([site_layers.layers for site_layers in sites], calls)
        if frozen:  # not the first batch, which has been checked
            new = new_layers(len(per_example), [*calls, *reading_calls], known)
        else:
            new = set()
            require_dependent(per_example)
        if not new:
            check = independent and not known
            names = {layer: each.site.layer for each in sites for layer in each.layers}
            every = [*calls, *reading_calls]
            found = find_layouts(per_example, every, known, check=check, passes=passes, names=names)
            _differentiate(per_example, calls)
    if new:  # learned once more, with gradients at all of the calls
        for layer in new:
            del known[layer]
        return capture(losses, batch, sites, reading_layers=reading_layers, layouts=known, independent=independent)
    return captured_from_calls(
        per_example.detach().float().cpu(), batch, sites, calls, found, reading_calls=reading_calls
    )


def captured_from_calls(
    losses: Tensor,
    batch: Any,
    sites: Sequence[SiteLayers],
    calls: Sequence[Call],
    layouts: Mapping[nn.Module, Layout],
    *,
    reading_calls: Sequence[Call] = (),
) -> Captured:
    """The gradients of a batch's examples from the calls of layers, after the backward pass.

    Args:
        losses: (B,) the losses of the batch's examples, on the CPU.
        batch: the batch that the module was called with; its attention masks mark padding.
        sites: the sites whose layers were called.
        calls: the calls of the sites' layers, with their gradients.
        layouts: for each layer, where the examples are in its calls.
        reading_calls: calls of embedding layers of which only the token ids are needed; they need no gradients.
    """

    def owners_of(layer_calls: Sequence[Call]) -> list[Tensor]:
        return [layouts[call.layer].owners(len(losses), call.positions) for call in layer_calls]

    token_owners = token_ids = torch.empty(0, dtype=torch.long)
    read: ReadPositions | None = None
    gradients: dict[str, Gradients] = {}
    for site_layers in sites:
        key = site_layers.site.key
        site_calls = _differentiated([call for call in calls if call.layer in site_layers.layers])
        if site_layers.site.has_words:
            token_owners, token_ids, rows, of_calls, places = word_positions(site_calls, owners_of(site_calls), batch)
            read = ReadPositions(of_calls, places, [call.inputs.shape for call in site_calls])
            gradients[key] = WordGradients.from_positions(len(losses), token_owners, token_ids, rows)
        else:
            owners, inputs, deltas = linear_positions(site_calls, owners_of(site_calls))
            gradients[key] = FactorGradients.from_positions(len(losses), owners, inputs, deltas)
    if reading_calls:
        # One feature is enough to find the tokens, and takes less memory.
        narrow = [
            replace(call, output=call.output[..., :1], gradient=call.output[..., :1].detach()) for call in reading_calls
        ]
        token_owners, token_ids, _, of_calls, places = word_positions(narrow, owners_of(reading_calls), batch)
        read = ReadPositions(of_calls, places, [call.inputs.shape for call in narrow])
    return Captured(losses, token_owners, token_ids, gradients, read)


def learn_layouts(
    losses: Losses, batch: Any, layers: Sequence[nn.Module], known: dict[nn.Module, Layout], *, independent: bool
) -> None:
    """Learn from a batch where the examples are in the layers' calls, by one backward pass, as FSDP needs it.

    After a forward pass without one, FSDP in mixed precision loses the gradients of the next training step.

    Args:
        losses: the function from a batch to its examples' losses.
        batch: a batch on the module's device.
        layers: the layers; at least one of them must be called.
        known: is added to.
        independent: whether to check that the first example's loss does not depend on other examples.

    Raises:
        ValueError: as :func:`capture` does.
    """
    with recorded_calls(losses, batch, layers) as (per_example, calls):
        find_layouts(per_example, calls, known, check=independent, passes=1)


def without_inference_tensors(batch: Any) -> Any:
    """The batch with copies in place of inference tensors, which autograd cannot save for a backward pass."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _difference(block: Gradients, others: Gradients) -> Gradients:
    """The gradients of one loss minus those of another, as capture gives them: of words, or factors."""
    if isinstance(block, WordGradients) and isinstance(others, WordGradients):
        return block.minus(others)
    assert isinstance(block, FactorGradients)
    assert isinstance(others, FactorGradients)
    return block.minus(others)


def _differentiate(losses: Tensor, calls: Sequence[Call]) -> None:
    """Run the backward pass, and give each call its gradient."""
    if losses.requires_grad:
        gradients = torch.autograd.grad(losses.sum(), [call.output for call in calls], allow_unused=True)
        for call, gradient in zip(calls, gradients, strict=True):
            call.gradient = gradient


def _differentiated(calls: list[Call]) -> list[Call]:
    """The calls that the losses depend on; all calls, with gradients of zero, if the losses depend on none."""
    return [call for call in calls if call.gradient is not None] or calls
