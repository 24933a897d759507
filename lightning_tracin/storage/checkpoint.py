"""Reading a checkpoint: its weights, the learning rates that led to it, and the training examples' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import fsum
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.files import damage_named, read_tensors
from lightning_tracin.storage.frozen import is_shared
from lightning_tracin.storage.layouts import DrawnLayout, WeightsLayout
from lightning_tracin.storage.schemas import CheckpointFile, Step, TraceHeader
from lightning_tracin.storage.second_moments import SecondMoments, moments_file
from lightning_tracin.storage.shards import Shards

#: The name of the file with the weights, in the folder of a checkpoint.
WEIGHTS = "weights.safetensors"

#: That of the file with the examples that were drawn, where those are not all.
DRAWN = "drawn.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The weights at one step of a fit, and the learning rates that led to them.

    Attributes:
        path: folder of this checkpoint.
        id: unique, also if a resumed fit records another checkpoint at the same step.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        previous: id of the checkpoint before; None for the first one.
        steps: the optimizer steps since the previous checkpoint; where they are very many, one for all that are alike,
            with the mean of their rates.
        groups: the parameter names of each group of each optimizer.
        checksums: of the files of weights, of second moments and of the examples that were drawn, by name; see
            :meth:`file`.
        header: what the trace says of all checkpoints.
        keeps_weights: whether weights are stored (``keep_weights`` of the callback).
        frozen_sites: the keys of the sites that no step of the whole trace moved.
        repeats: how many steps each of ``steps`` stands for; empty where that is one each.
    """

    path: Path
    id: str
    step: int
    epoch: int
    previous: str | None
    steps: list[Step]
    groups: list[list[list[str]]]
    checksums: dict[str, str]
    header: TraceHeader
    keeps_weights: bool = True
    frozen_sites: frozenset[str] = frozenset()
    repeats: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, header: TraceHeader, content: CheckpointFile) -> Checkpoint:
        """The checkpoint in a folder, whose ``checkpoint.json`` has this content."""
        fields: dict[str, Any] = msgspec.structs.asdict(content)
        del fields["checksum"]
        return cls(path=folder, header=header, **fields)

    @property
    def sites(self) -> Sequence[Site]:
        """Where gradients are taken."""
        return self.header.sites

    @property
    def trace_path(self) -> Path:
        """The folder of the trace, which no link may lead out of."""
        return self.path.parents[1]

    @property
    def learning_rate(self) -> float:
        """The mean learning rate since the previous checkpoint at the first site (the word table, if recorded)."""
        return self.learning_rate_of(self.sites[0])

    def learning_rate_of(self, site: Site) -> float:
        """The mean learning rate of a site's weight over the optimizer steps since the previous checkpoint.

        The bias counts with the rate of the weight, even if it is in another parameter group. A step that did not move
        the weight, because it was frozen then or its parameter group came later, counts with rate 0. A layer that was
        frozen for the whole fit has the rate of its group, or, if no optimizer has it, the mean over all groups.
        Without steps, the rate is 0.
        """
        held = self._groups_of(site)
        sums: list[float] = []
        n_rates = 0
        for (_, optimizer, group_rates, unmoved), n in self.counted_steps:
            rates: list[float] = []
            if not held:
                rates = group_rates if site.key in self.frozen_sites else [0.0]
            elif any(optimizer == each for each, _ in held):
                own = [rate for group, rate in enumerate(group_rates) if (optimizer, group) in held]
                moves = site.key not in unmoved or site.key in self.frozen_sites
                rates = own if own and moves else [0.0]
            sums += [n * rate for rate in rates]
            n_rates += n * len(rates)
        return fsum(sums) / n_rates if n_rates else 0.0

    @property
    def counted_steps(self) -> Iterator[tuple[Step, int]]:
        """Each of :attr:`steps`, with how many it stands for."""
        return zip(self.steps, self.repeats or repeat(1), strict=False)

    def moves(self, site: Site) -> bool:
        """Whether a step since the previous checkpoint moved a site's weight."""
        optimizers = {optimizer for optimizer, _ in self._groups_of(site)}
        return any(step[1] in optimizers and site.key not in step[3] for step in self.steps)

    def _groups_of(self, site: Site) -> set[tuple[int, int]]:
        """The optimizers and parameter groups that hold a site's weight."""
        prefix = f"{site.layer}."

        def groups_with(name_prefix: str) -> set[tuple[int, int]]:
            return {
                (optimizer, group)
                for optimizer, groups in enumerate(self.groups)
                for group, names in enumerate(groups)
                if any(name.startswith(name_prefix) for name in names)
            }

        # With adapters such as LoRA the weight itself is frozen, and only parameters under the layer are trained.
        return groups_with(f"{prefix}weight") or groups_with(prefix)

    @property
    def shared(self) -> dict[str, str]:
        """The checksums of the files of frozen weights that it shares with other checkpoints, by name."""
        return {name: checksum for name, checksum in self.checksums.items() if is_shared(name)}

    def file(self, name: str) -> Path:
        """Where a file of :attr:`checksums` is: in its own folder, or, with frozen weights, in that of the trace."""
        return (self.trace_path if is_shared(name) else self.path) / name

    def weights(self) -> dict[str, Tensor]:
        """The module's state dict, as trained (not averaged), with tied weights under each of their names.

        Raises:
            FileNotFoundError: if a file of weights is missing.
            ValueError: if one is not as it was written, or if the fit was to keep none.
        """
        require_weights([self])
        tensors: dict[str, Tensor] = {}
        for name, checksum in self.shared.items():
            tensors |= read_tensors(self.file(name), checksum, within=self.trace_path)[0]
        path = self.path / WEIGHTS
        own, tied = read_tensors(path, self.checksums[WEIGHTS], within=self.trace_path)
        tensors |= own
        with damage_named(path):
            WeightsLayout(self.header.model_fingerprint).check(tensors, tied)
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
        path = self.path / name
        return SecondMoments.read(path, self.checksums[name], has_words=site.has_words, within=self.trace_path)

    def check_file(self, name: str) -> None:
        """Check one of the files that this checkpoint holds checksums of.

        Raises:
            FileNotFoundError: if it is missing.
            ValueError: if it is damaged, or of a site that the trace has not.
        """
        site = next((site for site in self.sites if moments_file(site) == name), None)
        if site is not None:
            self.second_moments(site)
        elif name == WEIGHTS:
            self.weights()
        elif name == DRAWN:
            self.drawn()
        elif name in self.shared:
            read_tensors(self.file(name), self.checksums[name], within=self.trace_path)
        else:
            raise ValueError(f"{self.path / name} is of no site of the trace.")

    def drawn(self) -> Tensor | None:
        """(n_train,) bool, the examples that training has drawn since the previous checkpoint.

        None if it has drawn all, or if that is not known: of a stream, say.

        Raises:
            ValueError: if the file is not as it was written.
        """
        if DRAWN not in self.checksums:
            return None
        path, layout = self.path / DRAWN, DrawnLayout(self.header.n_train)
        tensors, _ = read_tensors(path, self.checksums[DRAWN], layout, within=self.trace_path)
        return tensors["drawn"]

    def has_gradients(self, site: Site) -> bool:
        """Whether the training examples' gradients at a site are stored."""
        return (self.path / site.key / "index.json").exists()

    def gradients(self, site: Site) -> Shards:
        """The stored gradients of the training examples at a site.

        Raises:
            FileNotFoundError: if they are not stored.
            ValueError: if their index is damaged.
        """
        shards = Shards.open(self.path / site.key, within=self.trace_path)
        return shards.checked(site.shape, self.header)


def require_weights(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that checkpoints have what gradients of other examples are computed from.

    Raises:
        ValueError: if a fit with ``keep_weights=False`` has recorded some of them.
    """
    without = [checkpoint.step for checkpoint in checkpoints if not checkpoint.keeps_weights]
    if without:
        raise ValueError(
            f"{len(without)} of {len(checkpoints)} checkpoints in {checkpoints[0].trace_path} have no weights (the "
            f"first is that of step {without[0]}): the fit recorded them with keep_weights=False. Gradients of other "
            "examples, or at other layers, cannot be taken there. self_influence answers from what is stored; for "
            "influence on test examples fit with keep_weights=True."
        )


def undrawn(checkpoints: Sequence[Checkpoint]) -> Tensor:
    """The indices of the examples that training has drawn before none of the checkpoints, int64.

    Raises:
        ValueError: if a file is not as it was written.
    """
    drawn = ever_drawn(checkpoints)
    return torch.empty(0, dtype=torch.int64) if drawn is None else torch.nonzero(~drawn)[:, 0]


def drawn_at(checkpoint: Checkpoint) -> Tensor:
    """The indices of the examples that training drew since the checkpoint before, or of all if that is not known.

    Raises:
        ValueError: if a file is not as it was written.
    """
    drawn = checkpoint.drawn()
    return torch.arange(checkpoint.header.n_train) if drawn is None else torch.nonzero(drawn)[:, 0]


def ever_drawn(checkpoints: Sequence[Checkpoint]) -> Tensor | None:
    """(n_train,) bool, the examples that training has drawn before some of the checkpoints; None if all, or not known.

    Raises:
        ValueError: if a file is not as it was written.
    """
    ever: Tensor | None = None
    for checkpoint in checkpoints:
        drawn = checkpoint.drawn()
        if drawn is None:
            return None
        ever = drawn if ever is None else ever | drawn
    return ever
