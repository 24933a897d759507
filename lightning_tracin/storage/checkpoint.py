"""Checkpoint: the weights of one moment of a fit, the learning rates that led to it, and where its gradients lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_tracin.gradients.second_moments import SecondMoments
from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.files import read_tensors
from lightning_tracin.storage.shards import Shards

#: One optimizer step: its number (``trainer.global_step`` before it), the optimizer, the rate of each of its groups.
Step = tuple[int, int, list[float]]

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one moment of a fit, and the learning rates that led to it.

    Attributes:
        path: folder of this checkpoint.
        id: tells it apart from every other, also from one that a resumed fit put in its place.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        steps: the optimizer steps since the previous checkpoint.
        groups: for each optimizer and parameter group, the names of its parameters.
        checksums: of the weights' and second moments' files.
        sites: where gradients are taken.
    """

    path: Path
    id: str
    step: int
    epoch: int
    steps: list[Step]
    groups: list[list[list[str]]]
    checksums: dict[str, str]
    sites: Sequence[Site]

    @property
    def learning_rate(self) -> float:
        """The first site's mean learning rate since the previous checkpoint: of the word embedding, if it is one."""
        return self.learning_rate_of(self.sites[0])

    def learning_rate_of(self, site: Site) -> float:
        """Mean rate, over the optimizer steps since the previous checkpoint, of the group that holds a site's weight.

        Its bias counts with the same rate, whatever its own group's. A layer that no optimizer trains (a frozen
        embedding) gets the mean over all groups.
        """
        prefix = f"{site.layer}."

        def holding(part: str) -> set[tuple[int, int]]:
            return {
                (optimizer, group)
                for optimizer, groups in enumerate(self.groups)
                for group, names in enumerate(groups)
                if any(name.startswith(part) for name in names)
            }

        held = holding(f"{prefix}weight") or holding(prefix)  # under adapters the weight is frozen, its parts are not
        rates = [
            rate
            for _, optimizer, of_groups in self.steps
            for group, rate in enumerate(of_groups)
            if not held or (optimizer, group) in held
        ]
        return sum(rates) / len(rates) if rates else 0.0

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict, as trained: not averaged, tied weights under each of their names.

        Raises:
            ValueError: if the file is not as it was written.
        """
        tensors, tied = self._read(WEIGHTS)
        return {**tensors, **{alias: tensors[name] for alias, name in tied.items()}}

    def second_moments(self, site: Site) -> SecondMoments:
        """Adam's bias-corrected second moments of a site's layer.

        Raises:
            ValueError: if the fit's optimizer kept none of that layer, or the file is not as it was written.
        """
        name = moments_file(site)
        if name not in self.checksums:
            raise ValueError(
                f'precondition="adam" needs Adam\'s second moments, but the fit kept none of {site.layer!r} at step '
                f"{self.step}: it was frozen, or its optimizer is not of the Adam family."
            )
        tensors, metadata = self._read(name)
        return SecondMoments(tensors["values"], tensors.get("rows"), float(metadata["eps"]))

    def has_gradients(self, site: Site) -> bool:
        """Whether the training examples' gradients at a site are stored."""
        return (self.path / site.key / "index.json").exists()

    def gradients(self, site: Site) -> Shards:
        """The training examples' gradients at a site."""
        return Shards.open(self.path / site.key)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_tensors(self.path / name, self.checksums[name])


def moments_file(site: Site) -> str:
    """The name of the file of a site's second moments."""
    return f"second-moments-{site.key}.safetensors"
