"""Reading a checkpoint: its weights, the learning rates that led to it, and the training examples' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.files import read_tensors
from lightning_tracin.storage.second_moments import SecondMoments, moments_file
from lightning_tracin.storage.shards import Shards

#: One optimizer step: ``trainer.global_step`` before it, the optimizer's number, the learning rate of each group.
Step = tuple[int, int, list[float]]

#: The name of the file with the weights, in the folder of a checkpoint.
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The weights at one step of a fit, and the learning rates that led to them.

    Attributes:
        path: folder of this checkpoint.
        id: unique, also if a resumed fit records another checkpoint at the same step.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        previous: id of the checkpoint before; None for the first one.
        steps: the optimizer steps since the previous checkpoint.
        groups: the parameter names of each group of each optimizer.
        checksums: of the files of weights and of second moments, by name.
        sites: where gradients are taken.
    """

    path: Path
    id: str
    step: int
    epoch: int
    previous: str | None
    steps: list[Step]
    groups: list[list[list[str]]]
    checksums: dict[str, str]
    sites: Sequence[Site]

    @property
    def learning_rate(self) -> float:
        """The mean learning rate since the previous checkpoint at the first site (the word table, if recorded)."""
        return self.learning_rate_of(self.sites[0])

    def learning_rate_of(self, site: Site) -> float:
        """The mean learning rate of a site's weight over the optimizer steps since the previous checkpoint.

        The bias counts with the rate of the weight, even if it is in another parameter group. A layer that no optimizer
        trains (a frozen embedding) gets the mean over all groups. Without steps, the rate is 0.
        """
        prefix = f"{site.layer}."

        def groups_with(name_prefix: str) -> set[tuple[int, int]]:
            return {
                (optimizer, group)
                for optimizer, groups in enumerate(self.groups)
                for group, names in enumerate(groups)
                if any(name.startswith(name_prefix) for name in names)
            }

        # With adapters such as LoRA the weight itself is frozen, and only parameters under the layer are trained.
        selected = groups_with(f"{prefix}weight") or groups_with(prefix)
        rates = [
            rate
            for _, optimizer, group_rates in self.steps
            for group, rate in enumerate(group_rates)
            if not selected or (optimizer, group) in selected
        ]
        return sum(rates) / len(rates) if rates else 0.0

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict, as trained (not averaged), with tied weights under each of their names.

        Raises:
            ValueError: if the file is not as it was written.
        """
        tensors, tied = read_tensors(self.path / WEIGHTS, self.checksums[WEIGHTS])
        return {**tensors, **{alias: tensors[name] for alias, name in tied.items()}}

    def second_moments(self, site: Site) -> SecondMoments:
        """Adam's bias-corrected second moments of a site's layer.

        Raises:
            ValueError: if the fit's optimizer had none of that layer, or the file is not as it was written.
        """
        name = moments_file(site)
        if name not in self.checksums:
            raise ValueError(
                f'precondition="adam" needs Adam\'s second moments, but the fit kept none of {site.layer!r} at step '
                f"{self.step}: it was frozen, or its optimizer is not of the Adam family."
            )
        return SecondMoments.read(self.path / name, self.checksums[name])

    def has_gradients(self, site: Site) -> bool:
        """Whether the training examples' gradients at a site are stored."""
        return (self.path / site.key / "index.json").exists()

    def gradients(self, site: Site) -> Shards:
        """The stored gradients of the training examples at a site.

        Raises:
            FileNotFoundError: if they are not stored.
            ValueError: if their index is damaged.
        """
        return Shards.open(self.path / site.key)
