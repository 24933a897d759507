"""Adam's second moments of a site's weight: taken from the optimizers, in a file, and as weights of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.linear_layers import as_matrix
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import gathered_tensor, parameter_names
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.storage.files import read_tensors, write_tensors
from lightning_tracin.storage.layouts import MomentsLayout


@dataclass(frozen=True)
class SecondMoments:
    """Adam's bias-corrected second moments of a layer's weight (Kingma and Ba 2015, arXiv 1412.6980).

    Attributes:
        values: (rows, columns) of the weight; for a linear layer with a bias, the bias is the last column.
        rows: (rows,) sorted token ids, if only the rows of words that were trained on are stored; else None.
        eps: Adam's epsilon.
    """

    values: Tensor
    rows: Tensor | None
    eps: float

    @classmethod
    def read(cls, path: Path, checksum: str, *, has_words: bool, within: Path) -> SecondMoments:
        """Read the file that :meth:`write` wrote.

        Args:
            path: the file.
            checksum: of its bytes.
            has_words: whether they are of a word embedding table.
            within: the folder that no link may lead out of.

        Raises:
            ValueError: if the file is not as it was written.
        """
        tensors, metadata = read_tensors(path, checksum, MomentsLayout(has_words), within=within)
        return cls(tensors["values"], tensors.get("rows"), float(metadata["eps"]))

    def write(self, path: Path) -> str:
        """Write a safetensors file atomically, and return its checksum."""
        tensors = {"values": self.values}
        if self.rows is not None:
            tensors["rows"] = self.rows
        return write_tensors(path, tensors, {"eps": repr(self.eps)})

    def of_tokens(self, tokens: Tensor) -> SecondMoments:
        """The second moments of some tokens' rows, (len(tokens), columns); 0 for a token that was not trained on."""
        if self.rows is None:
            return replace(self, values=self.values[tokens])
        if not len(self.rows):
            return SecondMoments(self.values.new_zeros(len(tokens), self.values.shape[1]), None, self.eps)
        places = torch.searchsorted(self.rows, tokens).clamp(max=len(self.rows) - 1)
        is_stored = self.rows[places] == tokens
        return SecondMoments(self.values[places] * is_stored[:, None], None, self.eps)

    def weights(self) -> Tensor:
        """The factors of products of gradients: 1 / (root + eps), and 0 for weights that Adam has not updated yet."""
        return torch.where(self.values > 0, 1 / (self.values.sqrt() + self.eps), 0.0)


def second_moments_at(
    site: Site,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    processes: Processes,
) -> SecondMoments | None:
    """Adam's second moments of the weight and bias of a site's layer; at the word table, only of rows that have any.

    Args:
        site: where gradients are taken; it names the layer.
        module: the module that the optimizers train.
        optimizers: the optimizers of the fit.
        state: the module's state dict, with full weights.
        processes: the processes that each have a part of the optimizers' state; all of them must call this function.

    Returns:
        None if the layer is frozen, or its optimizer is not of the Adam family.
    """
    layer, names = named_layer(module, site.layer), parameter_names(module)
    columns: list[Tensor] = []
    eps = 0.0
    for kind in ("weight", "bias"):
        parameter = getattr(layer, kind, None)
        if parameter is None:
            continue
        corrected, eps = _second_moment(parameter, optimizers)
        if processes.size > 1:
            full = state.get(names[id(parameter)][0])
            corrected = gathered_tensor(corrected, None if full is None else full.shape, processes)
        if corrected is None:
            return None
        columns.append(corrected[:, None] if corrected.dim() == 1 else as_matrix(layer, corrected))
    if not columns:
        return None
    values = torch.cat(columns, dim=1)
    rows = torch.nonzero(values.any(dim=1))[:, 0] if site.has_words else None
    return SecondMoments(values if rows is None else values[rows], rows, eps)


def moments_file(site: Site) -> str:
    """The name of the file with a site's second moments, in the folder of a checkpoint."""
    return f"second-moments-{site.key}.safetensors"


def _second_moment(parameter: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Tensor | None, float]:
    """Adam's bias-corrected second moment of a parameter, None if no optimizer has one, and Adam's epsilon."""
    groups = [
        (optimizer.state.get(parameter, {}), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(member is parameter for member in group["params"])
        and "betas" in group
        and isinstance(group.get("eps"), (int, float))  # Adafactor's eps, for one, is a pair
    ]
    for state, group in groups:
        if "exp_avg_sq" in state and "step" in state:  # without the step, the bias cannot be corrected
            corrected = state["exp_avg_sq"].float().cpu() / (1 - group["betas"][1] ** float(state["step"]))
            return corrected, group["eps"]
    return None, max((float(group["eps"]) for _, group in groups), default=0.0)
