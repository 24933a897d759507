"""What is written of each checkpoint of a run that is over: weights, learning rates and Adam's second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from torch import Tensor, nn

from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import full_state_dict, parameter_names
from lightning_tracin.parallel.processes import ALONE
from lightning_tracin.past.checkpoints import PastCheckpoint
from lightning_tracin.past.names import names_in_module
from lightning_tracin.past.optimizers import SavedOptimizer, groups_of
from lightning_tracin.past.rates import Configured, MeanRates, mean_rates
from lightning_tracin.storage.assembled_trace import KnownCheckpoint
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.recorded_checkpoint import frozen_names
from lightning_tracin.storage.schemas import Step
from lightning_tracin.storage.second_moments import SecondMoments, moments_file, second_moments_at


@dataclass(frozen=True)
class KnownRun:
    """What a run's checkpoints tell of a module.

    Attributes:
        module: is given the weights of each checkpoint in turn.
        checkpoints: in the order of the run.
        names: of each, the module's name of each of its weights.
        optimizers: of each, its optimizers with their states; none where it is not known which parameters those are of.
        rates: of each, the mean rates of its optimizers' groups; None where a trace tells them, or they were given.
        notes: what is only approximate, or not known.
    """

    module: nn.Module
    checkpoints: Sequence[PastCheckpoint]
    names: Sequence[Mapping[str, str]]
    optimizers: Sequence[Sequence[SavedOptimizer]]
    rates: Sequence[MeanRates | None]
    notes: Sequence[str]

    @classmethod
    def of(cls, module: nn.Module, checkpoints: Sequence[PastCheckpoint], configured: Configured | str) -> KnownRun:
        """Find out what checkpoints tell.

        Args:
            module: the module.
            checkpoints: in the order of the run.
            configured: the optimizers and schedulers that the module makes, or why it makes none.

        Raises:
            ValueError: if they are not of this module, or do not tell learning rates.
        """
        state = full_state_dict(module)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        names = [names_in_module(each.weights(), tensors, each.name) for each in checkpoints]
        notes: list[str] = []
        optimizers: list[list[SavedOptimizer]] = []
        for each, own in zip(checkpoints, names, strict=True):
            made = configured if isinstance(configured, str) else configured.optimizers
            groups = groups_of(each, module, own, made) if each.optimizers else []
            if isinstance(groups, str):
                optimizers.append([])
                notes.append(
                    f"Adam's second moments are not known, nor which layers a parameter group holds: {groups}."
                )
            else:
                optimizers.append([SavedOptimizer(*pair) for pair in zip(each.optimizers, groups, strict=True)])
        rates: Sequence[MeanRates | None] = [None] * len(checkpoints)
        if any(each.rate is None and each.recorded is None for each in checkpoints):
            rates, approximate = mean_rates(checkpoints, configured)
            if approximate is not None:
                notes.append(f"The learning rates between the checkpoints are approximate: {approximate}.")
        return cls(module, checkpoints, names, optimizers, rates, list(dict.fromkeys(notes)))

    def load(self, number: int) -> None:
        """Give the module the weights of a checkpoint."""
        weights, names = self.checkpoints[number].weights(), self.names[number]
        self.module.load_state_dict({names[own]: value for own, value in weights.items() if own in names}, strict=False)

    def known(self, sites: Sequence[Site], drawn: Sequence[Tensor | None]) -> Iterator[KnownCheckpoint]:
        """What is written of each checkpoint, one after the other.

        Args:
            sites: where gradients are taken.
            drawn: of each, the examples that count as trained on before it.

        Raises:
            ValueError: if groups whose parameters are not known have different rates.
        """
        for number, each in enumerate(self.checkpoints):
            self.load(number)
            groups, steps = self._groups_and_steps(number, sites)
            yield KnownCheckpoint(
                step=each.number,
                epoch=each.epoch,
                steps=steps,
                groups=groups,
                weights=full_state_dict(self.module),
                frozen=frozen_names(self.module),
                moments=dict(self._moments(number, sites)),
                drawn=drawn[number],
                repeats=each.recorded.repeats if each.recorded is not None and each.rate is None else [],
            )

    def _groups_and_steps(self, number: int, sites: Sequence[Site]) -> tuple[list[list[list[str]]], list[Step]]:
        """The names in each group, and a step of each optimizer that stands for all, with the mean rates."""
        each, optimizers, rates = self.checkpoints[number], self.optimizers[number], self.rates[number]
        names = parameter_names(self.module)
        last = max(0, each.number - 1)
        everything = [[[name for own in names.values() for name in own]]]
        if each.rate is not None:
            return everything, [(last, 0, [each.rate], [])]
        if each.recorded is not None:
            return _recorded_groups(each.recorded, self.names[number]), _recorded_steps(
                each.recorded, self._recorded_sites(number, sites)
            )
        assert rates is not None
        if optimizers:
            groups = [
                [[name for own in group["params"] for name in names[id(own)]] for group in optimizer.param_groups]
                for optimizer in optimizers
            ]
            unmoved = [self._unmoved(optimizer, sites) for optimizer in optimizers]
            of_groups = [
                own * len(of_optimizer) if len(own) == 1 else own
                for own, of_optimizer in zip(rates, groups, strict=True)
            ]
            return groups, [(last, at, own, unmoved[at]) for at, own in enumerate(of_groups)]
        means = [rate for of_optimizer in rates for rate in of_optimizer]
        if not all(isclose(rate, means[0], rel_tol=1e-6) for rate in means):
            raise ValueError(
                f"The parameter groups in {each.name} have different learning rates, and which layers they hold is not "
                "known. Pass the LightningModule that was trained, or learning_rates=[...], one for each checkpoint."
            )
        return everything, [(last, 0, [means[0]], [])]

    def _unmoved(self, optimizer: SavedOptimizer, sites: Sequence[Site]) -> list[str]:
        """The keys of the sites that an optimizer has, but has never moved: Adam keeps a state of what it moves."""
        owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        found = []
        for each in sites_on_module(self.module, sites) if optimizer.state else ():
            own = [parameter for layer in each.layers for parameter in layer.parameters() if parameter in owned]
            if own and not any(parameter in optimizer.state for parameter in own):
                found.append(each.site.key)
        return found

    def _moments(self, number: int, sites: Sequence[Site]) -> Iterator[tuple[Site, SecondMoments]]:
        """Adam's second moments, at the sites where they are known."""
        recorded = self.checkpoints[number].recorded
        if recorded is not None:
            for own, site in self._recorded_sites(number, sites).items():
                if moments_file(own) in recorded.checksums:
                    yield site, recorded.second_moments(own)
            return
        for site in sites:
            moments = second_moments_at(site, self.module, self.optimizers[number], {}, ALONE)
            if moments is not None:
                yield site, moments

    def _recorded_sites(self, number: int, sites: Sequence[Site]) -> dict[Site, Site]:
        """The sites of a trace's checkpoint that are those of some of these, by their layers."""
        recorded, names = self.checkpoints[number].recorded, self.names[number]
        assert recorded is not None
        of_layer = {site.layer: site for site in sites}
        layers = {own.rpartition(".")[0]: name.rpartition(".")[0] for own, name in names.items()}
        found = {own: of_layer.get(layers.get(own.layer, "")) for own in recorded.sites}
        return {own: site for own, site in found.items() if site is not None}


def _recorded_groups(recorded: Checkpoint, names: Mapping[str, str]) -> list[list[list[str]]]:
    """The groups of a trace's checkpoint, by the module's names."""
    return [[[names.get(own, own) for own in group] for group in groups] for groups in recorded.groups]


def _recorded_steps(recorded: Checkpoint, sites: Mapping[Site, Site]) -> list[Step]:
    """The steps of a trace's checkpoint, with the keys that its sites have now."""
    keys = {own.key: site.key for own, site in sites.items()}
    return [
        (step, at, rates, [keys[key] for key in unmoved if key in keys]) for step, at, rates, unmoved in recorded.steps
    ]
