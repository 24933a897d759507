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
from lightning_tracin.gradients.example_dims import detect_example_dims, examples_of_positions
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.layers import SiteLayers
from lightning_tracin.gradients.losses import Losses, checked_losses
from lightning_tracin.gradients.positions import linear_positions, word_positions
from lightning_tracin.gradients.sites import Gradients
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients


@dataclass(frozen=True)
class Captured:
    """The losses, tokens and gradients of a batch of B examples, on the CPU.

    Attributes:
        losses: (B,) float32.
        token_owners: (P,) the example of each position that the embedding layer read, without padding.
        token_ids: (P,) the token id at each of these positions, in reading order inside an example.
        gradients: the gradients by the key of their site: one row for each word, or factors at linear layers.
    """

    losses: Tensor
    token_owners: Tensor
    token_ids: Tensor
    gradients: Mapping[str, Gradients]

    def __len__(self) -> int:
        return len(self.losses)

    def first_not_finite(self) -> int | None:
        """The place in the batch of the first example with a loss or gradient that is not finite; None without one."""
        not_finite = ~torch.isfinite(self.losses)
        for block in self.gradients.values():
            norms = block.input_norms * block.delta_norms if isinstance(block, FactorGradients) else block.norms
            not_finite[block.examples[~torch.isfinite(norms)]] = True
        return int(torch.nonzero(not_finite)[0, 0]) if bool(not_finite.any()) else None

    def texts(self, labels: Tensor | None) -> Texts:
        """The examples' token ids and labels; labels that are not one number for each example, (B,), become NaN."""
        if labels is not None and labels.shape == (len(self),):
            numbers = labels.detach().cpu().double()
        else:
            numbers = torch.full((len(self),), torch.nan, dtype=torch.float64)
        return Texts(len(self), self.token_owners, self.token_ids, numbers)


def capture(
    losses: Losses,
    batch: Any,
    sites: Sequence[SiteLayers],
    *,
    reading_layers: Sequence[nn.Module] = (),
    dims: dict[nn.Module, int] | None = None,
    module: nn.Module | None = None,
    independent: bool = True,
) -> Captured:
    """The gradients of a batch's examples, from one forward and one backward pass.

    Call it inside :func:`~lightning_tracin.gradients.eval_mode.gradients_enabled`. The results are on the CPU.

    Args:
        losses: the function from a batch to its examples' losses.
        batch: an argument of the module's ``training_step``, on the module's device.
        sites: where gradients are taken, summed over all calls of a site's layers and over all positions.
        reading_layers: embedding layers of which only the token ids are needed.
        dims: for each layer, the dimension of its calls that counts the examples, as far as earlier batches determined
            it; this batch adds to it. A batch for which it is empty takes one more backward pass.
        module: the module whose parameters are frozen once ``dims`` has all layers, so that the graph is smaller; None
            to leave them as they are.
        independent: whether to check, on a batch for which ``dims`` is empty, that the first example's loss does not
            depend on other examples.

    Raises:
        ValueError: if the losses are not of shape (B,), if the first example's loss depends on others, or if a layer
            was not called as expected.
    """
    calls: list[Call] = []
    reading_calls: list[Call] = []
    known = {} if dims is None else dims
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
        if not frozen:  # a frozen batch is not the first one, which has been checked
            require_dependent(per_example)
        batch_dims = detect_example_dims(per_example, [*calls, *reading_calls], known, check=independent and not known)
        if per_example.requires_grad:
            gradients = torch.autograd.grad(per_example.sum(), [call.output for call in calls], allow_unused=True)
            for call, gradient in zip(calls, gradients, strict=True):
                call.gradient = gradient
    return captured_from_calls(
        per_example.detach().float().cpu(), batch, sites, calls, batch_dims, reading_calls=reading_calls
    )


def captured_from_calls(
    losses: Tensor,
    batch: Any,
    sites: Sequence[SiteLayers],
    calls: Sequence[Call],
    dims: Mapping[nn.Module, int],
    *,
    reading_calls: Sequence[Call] = (),
) -> Captured:
    """The gradients of a batch's examples from the calls of layers, after the backward pass.

    Args:
        losses: (B,) the losses of the batch's examples, on the CPU.
        batch: the batch that the module was called with; its attention masks mark padding.
        sites: the sites whose layers were called.
        calls: the calls of the sites' layers, with their gradients.
        dims: for each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).
        reading_calls: calls of embedding layers of which only the token ids are needed; they need no gradients.
    """

    def owners_of(layer_calls: Sequence[Call]) -> list[Tensor]:
        return [examples_of_positions(len(losses), call.positions, dims[call.layer]) for call in layer_calls]

    token_owners = token_ids = torch.empty(0, dtype=torch.long)
    gradients: dict[str, Gradients] = {}
    for site_layers in sites:
        key = site_layers.site.key
        site_calls = _differentiated([call for call in calls if call.layer in site_layers.layers])
        if site_layers.site.has_words:
            token_owners, token_ids, rows = word_positions(site_calls, owners_of(site_calls), batch)
            gradients[key] = WordGradients.from_positions(len(losses), token_owners, token_ids, rows)
        else:
            positions = linear_positions(site_calls, owners_of(site_calls))
            gradients[key] = FactorGradients.from_positions(len(losses), *positions)
    if reading_calls:
        # One feature is enough to find the tokens, and takes less memory.
        narrow = [
            replace(call, output=call.output[..., :1], gradient=call.output[..., :1].detach()) for call in reading_calls
        ]
        token_owners, token_ids, _ = word_positions(narrow, owners_of(reading_calls), batch)
    return Captured(losses, token_owners, token_ids, gradients)


def find_example_dims(
    losses: Losses, batch: Any, layers: Sequence[nn.Module], *, independent: bool
) -> dict[nn.Module, int]:
    """For each layer, the dimension of its calls that counts the examples: 0, or 1 (time first).

    It always runs one backward pass: after a forward pass without one, FSDP in mixed precision loses the gradients of
    the next training step.

    Args:
        losses: the function from a batch to its examples' losses.
        batch: a batch on the module's device.
        layers: the layers; at least one of them must be called.
        independent: whether to check that the first example's loss does not depend on other examples.

    Raises:
        ValueError: as :func:`capture` does.
    """
    with recorded_calls(losses, batch, layers) as (per_example, calls):
        return detect_example_dims(per_example, calls, {}, check=independent, always=True)


def without_inference_tensors(batch: Any) -> Any:
    """The batch with copies in place of inference tensors, which autograd cannot save for a backward pass."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _differentiated(calls: list[Call]) -> list[Call]:
    """The calls that the losses depend on; all calls, with gradients of zero, if the losses depend on none."""
    return [call for call in calls if call.gradient is not None] or calls
