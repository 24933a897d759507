"""The mean learning rates between the checkpoints of a run that is over.

A checkpoint tells the rate of the step that would have followed. Those in between are known where nothing changed them,
where every step was logged, or where the schedule is made again and gives all rates that were saved.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch

from lightning_tracin.past.checkpoints import PastCheckpoint, first_line

#: Of each optimizer, the mean rate of each parameter group.
MeanRates: TypeAlias = list[list[float]]

_CLOSE = 1e-5  # to which rates that were saved or logged agree with those of a schedule

_BY_HAND = "optimizer_step of the module may change them"

_GIVE = "Pass learning_rates=[...], one for each checkpoint."


@dataclass(frozen=True)
class Configured:
    """What a module's ``configure_optimizers`` returned, made anew.

    Attributes:
        optimizers: its optimizers.
        schedulers: what Lightning makes of its schedulers: with ``scheduler``, ``interval``, ``frequency`` and
            ``reduce_on_plateau``.
        automatic: whether Lightning steps them.
        by_hand: whether the module overrides ``optimizer_step``, where warm-ups are often written.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[Any]
    automatic: bool
    by_hand: bool = False


def mean_rates(
    checkpoints: Sequence[PastCheckpoint], configured: Configured | str
) -> tuple[list[MeanRates], str | None]:
    """The mean rates in the steps that led to each checkpoint, and why they are approximate, if they are.

    Args:
        checkpoints: in the order of the run.
        configured: the optimizers and schedulers that the module makes, or why it makes none.

    Raises:
        ValueError: if the checkpoints do not tell them.
    """
    if all(each.of_trainer for each in checkpoints):
        return _rates_of_trainer(checkpoints)
    without = [each.name for each in checkpoints if not each.optimizers]
    if without:
        raise ValueError(
            f"{without[0]} holds no optimizer, so the learning rates before it are not known (was it saved with "
            f"save_weights_only?). {_GIVE}"
        )
    by_itself = [
        each.name
        for each in checkpoints
        if any(group["lr"] is None for state in each.optimizers for group in state["param_groups"])
    ]
    if by_itself:
        raise ValueError(
            f"The optimizer in {by_itself[0]} found its learning rates by itself (lr=None), and does not tell them. "
            f"{_GIVE}"
        )
    saved = [
        [[float(group["lr"]) for group in state["param_groups"]] for state in each.optimizers] for each in checkpoints
    ]
    forms = {tuple(len(groups) for groups in rates) for rates in saved}
    if len(forms) > 1:
        raise ValueError(f"The checkpoints have optimizers with different parameter groups, {sorted(forms)}. {_GIVE}")
    by_hand = not isinstance(configured, str) and configured.by_hand
    if not any(each.schedulers for each in checkpoints) and all(rates == saved[0] for rates in saved):
        return saved, f"{_BY_HAND}; those of the checkpoints are all alike, and stand for them" if by_hand else None
    replayed = _BY_HAND if by_hand else _replayed(checkpoints, saved, configured)
    if not isinstance(replayed, str):
        return replayed, None
    first = [
        [float(group.get("initial_lr", group["lr"])) for group in state["param_groups"]]
        for state in checkpoints[0].optimizers
    ]
    ends = zip([first, *saved], saved, strict=False)
    means = [
        [[(a + b) / 2 for a, b in zip(*groups, strict=True)] for groups in zip(*pair, strict=True)] for pair in ends
    ]
    return means, f"{replayed}; the mean of the rates at both ends stands for them"


def _replayed(
    checkpoints: Sequence[PastCheckpoint], saved: Sequence[MeanRates], configured: Configured | str
) -> list[MeanRates] | str:
    """The mean rates of the module's own schedule, if it gives all rates that were saved; else why it is not known."""
    if isinstance(configured, str):
        return configured
    if not configured.automatic or len(configured.optimizers) != 1 or len(saved[0]) != 1:
        return "there are several optimizers, or they are stepped by hand"
    if any(config.reduce_on_plateau for config in configured.schedulers):
        return "the schedule follows a metric"
    steps_per_epoch = _steps_per_epoch(checkpoints)
    if steps_per_epoch is None and any(config.interval == "epoch" for config in configured.schedulers):
        return "the schedule goes by epochs, and the checkpoints do not tell how many steps those have"
    try:
        rates = np.array(list(_schedule(configured, checkpoints[-1].number, steps_per_epoch)))
    except Exception as error:  # a scheduler of the user's own may need what only a fit has
        return f"the schedule cannot be made again ({type(error).__name__}: {first_line(error)})"
    for each, (own,) in zip(checkpoints, saved, strict=True):
        if len(own) != rates.shape[1] or not np.allclose(rates[each.number], own, rtol=_CLOSE, atol=0):
            return (
                f"configure_optimizers gives the rates {_short(rates[each.number])} after {each.number} steps, but "
                f"{each.name} holds {_short(own)}"
            )
    differing = _differing(
        checkpoints[-1].schedulers, [config.scheduler.state_dict() for config in configured.schedulers]
    )
    if differing is not None:
        return f"configure_optimizers makes another schedule than that of {checkpoints[-1].name}: {differing}"
    bounds = pairwise([0, *(each.number for each in checkpoints)])
    return [[_means(rates[start:stop])] for start, stop in bounds]


def _differing(saved: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> str | None:
    """In what schedulers differ, by the numbers in their states; None if they do not."""
    if len(saved) != len(made):
        return f"{len(saved)} schedulers there, {len(made)} here"
    for there, here in zip(saved, made, strict=True):
        numbers = {name for name, value in here.items() if isinstance(value, (int, float)) and not name.startswith("_")}
        for name in sorted(numbers & there.keys()):
            if isinstance(there[name], (int, float)) and not math.isclose(there[name], here[name], rel_tol=_CLOSE):
                return f"{name} is {there[name]:g} there, {here[name]:g} here"
    return None


def _schedule(configured: Configured, n_steps: int, steps_per_epoch: int | None) -> Iterator[list[float]]:
    """The rates of each group in each step, and in the one that would follow, as Lightning steps schedulers."""
    (optimizer,) = configured.optimizers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that the optimizer makes no steps
        yield [float(group["lr"]) for group in optimizer.param_groups]
        for step in range(n_steps):
            epoch, batch = divmod(step, steps_per_epoch or n_steps)
            ends = batch + 1 == steps_per_epoch
            for config in configured.schedulers:
                place = epoch if config.interval == "epoch" else batch
                if (config.interval == "step" or ends) and (place + 1) % config.frequency == 0:
                    config.scheduler.step()
            yield [float(group["lr"]) for group in optimizer.param_groups]


def _steps_per_epoch(checkpoints: Sequence[PastCheckpoint]) -> int | None:
    """How many steps an epoch has, if all checkpoints are of the ends of epochs of one length."""
    found = {divmod(each.number, each.epoch + 1) for each in checkpoints}
    (steps, rest), *others = found
    return None if others or rest or not steps else steps


def _rates_of_trainer(checkpoints: Sequence[PastCheckpoint]) -> tuple[list[MeanRates], str | None]:
    """The mean rates of a run of Hugging Face's Trainer, by its scheduler's states and the rates that it logged."""
    last = checkpoints[-1]
    states = {each.number: each.schedulers[0] for each in checkpoints if each.schedulers and _is_in_step(each)}
    bases = next(
        (found for state in states.values() if (found := _numbers(state.get("base_lrs"))) and found[0] > 0), []
    )
    saved = {step: rates[0] for step, state in states.items() if (rates := _numbers(state.get("_last_lr")))}
    known = {**_logged(last, saved), **saved}
    if not known:
        raise ValueError(
            f"{last.name} tells no learning rates: it has no scheduler.pt, and trainer_state.json logged none. {_GIVE}"
        )
    of_steps, why = _filled(known, bases[0] if bases else None, last.number, last.max_steps)
    if why is None and min(known) > 0 and set(of_steps) == set(bases[:1]) and _may_warm_up(states.values()):
        why = f"a warm-up that was over before step {min(known)}, the first whose rate was saved or logged, is not seen"
    of_groups = [own / bases[0] for own in bases] or [1.0]
    means = [
        float(of_steps[start:stop].mean()) if stop > start else 0.0
        for start, stop in pairwise([0, *(each.number for each in checkpoints)])
    ]
    return [[[mean * factor for factor in of_groups]] for mean in means], why


def _may_warm_up(states: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a schedule that was constant when it was seen may have begun otherwise.

    A ``LambdaLR`` saves None for a plain function, as that of transformers' constant schedule, but not for a partial
    one, as that with a warm-up.
    """
    saved = [each for state in states for each in state.get("lr_lambdas") or []]
    return not saved or any(each is not None for each in saved)


def _logged(checkpoint: PastCheckpoint, saved: Mapping[int, float]) -> dict[int, float]:
    """The rates that were logged, by the step (from 0) that used them.

    Of n steps done, the Trainer logs the rate of the last of them; before transformers 4.51, that of the one to come,
    which the scheduler's state tells.
    """
    logged = dict(checkpoint.logged)
    both = [(logged[step], rate) for step, rate in saved.items() if step in logged]
    of_next = bool(both) and all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in both)
    return {step if of_next else step - 1: rate for step, rate in logged.items() if step > 0}


def _filled(
    known: Mapping[int, float], base: float | None, n_steps: int, max_steps: int | None
) -> tuple[np.ndarray[Any, Any], str | None]:
    """The rate of each of a run's steps, from those that are known, and why it is approximate, if it is."""
    if all(step in known for step in range(n_steps)):
        return np.array([known[step] for step in range(n_steps)]), None
    if base is not None:
        for schedule in _usual_schedules(known, base, max_steps or n_steps):
            if all(
                math.isclose(base * schedule(step), rate, rel_tol=1e-4, abs_tol=base * _CLOSE)
                for step, rate in known.items()
            ):
                return np.array([base * schedule(step) for step in range(n_steps)]), None
    points = sorted(known.items())
    filled = np.interp(np.arange(n_steps), [step for step, _ in points], [rate for _, rate in points])
    return filled, "the schedule is none of the Trainer's usual ones; between rates that were logged, those on a line"


def _usual_schedules(known: Mapping[int, float], base: float, max_steps: int) -> Iterator[Callable[[int], float]]:
    """The Trainer's schedules: constant, linear and cosine, without warm-up and with the one that known rates tell.

    A warm-up is only believed where more rates than the one that told it are there to confirm it.
    """
    from transformers import get_scheduler  # here: it takes seconds

    for kind in ("constant", "linear", "cosine", "constant_with_warmup"):
        warmups = {0} if kind != "constant_with_warmup" else set()
        if sum(0 < rate < base for rate in known.values()) > 1 and kind != "constant":
            warmups |= {each for step, rate in known.items() for each in _warmups(kind, step, rate / base, max_steps)}
        for warmup in sorted(warmups):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
            made = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps)
            yield made.lr_lambdas[0]


def _warmups(kind: str, step: int, share: float, max_steps: int) -> set[int]:
    """How many steps of warm-up would give a share of the full rate at a step."""
    if not 0 < share < 1:
        return set()
    found = [step / share]
    if kind == "linear":
        found.append(max_steps - (max_steps - step) / share)
    elif kind == "cosine":
        done = math.acos(2 * share - 1) / math.pi
        found.append((step - done * max_steps) / (1 - done) if done < 1 else -1)
    return {round(each) for each in found if 0 <= each <= max_steps}


def _is_in_step(checkpoint: PastCheckpoint) -> bool:
    """Whether a scheduler was stepped at each step; where fp16 scaling left some out, it was not."""
    return bool(checkpoint.schedulers[0].get("last_epoch") == checkpoint.number)


def _numbers(value: Any) -> list[float]:
    """Finite numbers of a list; none of anything else."""
    numbers = value if isinstance(value, list) else []
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers):
        return []
    return [float(each) for each in numbers]


def _means(rates: np.ndarray[Any, Any]) -> list[float]:
    """The mean rate of each group over some steps; 0 over none."""
    return [float(each) for each in rates.mean(0)] if len(rates) else [0.0] * rates.shape[1]


def _short(rates: Any) -> str:
    return ", ".join(f"{rate:.4g}" for rate in list(rates)[:4])
