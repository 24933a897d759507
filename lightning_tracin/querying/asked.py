"""What a question leaves open: the module, the trace and the loaders of the last fit in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn

from lightning_tracin.bridge.compat import DATAMODULES
from lightning_tracin.bridge.hugging_face import is_hugging_face, wrapped_model
from lightning_tracin.bridge.recorded_fits import recorded_fit_of
from lightning_tracin.bridge.strategy import spreads
from lightning_tracin.bridge.training_set import RecordedFit
from lightning_tracin.parallel.fsdp import is_fsdp, require_spread
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.querying.passes import attribute_set, serving
from lightning_tracin.storage.trace import Trace


def module_asked(trainer: pl.Trainer, model: Any, *loaders: Any) -> pl.LightningModule:
    """The module that is passed, or that of the last fit.

    Args:
        trainer: whose last fit counts.
        model: what was passed.
        loaders: of examples, whose tokenizer may name a Hugging Face model's words.

    Raises:
        ValueError: if there is none.
    """
    module = given_module(trainer, model, *loaders) or trainer.lightning_module
    if module is None:
        raise ValueError("This trainer has not fitted a model in this process: pass model=..., and trace=...")
    return usable_module(trainer, module)


def given_module(trainer: Any, model: Any, *loaders: Any) -> pl.LightningModule | None:
    """The model that was passed, uncompiled; one of Hugging Face is wrapped.

    Args:
        trainer: of the package of Lightning that it is for.
        model: what was passed.
        loaders: of examples, whose tokenizer may name a Hugging Face model's words.

    Raises:
        TypeError: if it is none.
    """
    module = getattr(model, "_orig_mod", model)
    if is_hugging_face(module):
        return wrapped_model(module, trainer, *loaders)
    if not isinstance(module, (nn.Module, type(None))):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        advice = "The order is trainer.influence(test_loader, model) and trainer.self_influence(model, "
        advice += "train_dataloaders=train_loader); a datamodule is passed as datamodule=..., a folder as trace=...."
        if isinstance(module, type):
            advice = f"Pass one of it: {module.__name__}(...)."
        raise TypeError(f"model must be a LightningModule or a Hugging Face model, but got {got}. {advice}")
    return module  # type: ignore[return-value]


def usable_module(trainer: pl.Trainer, module: pl.LightningModule) -> pl.LightningModule:
    """The module with all of its layers, unless another trainer has spread its weights.

    Raises:
        ValueError: if one has.
    """
    if not is_fsdp(module):
        module.configure_model()  # a new module has yet to build its layers; it may be called again
    elif module.trainer is not trainer:
        raise ValueError(
            f"Another trainer has spread the weights of this {type(module).__name__} over its processes (FSDP). Pass a "
            "new one as model=...; the trace has the weights."
        )
    return module


def spread_weights(
    trainer: pl.Trainer, module: pl.LightningModule, loader: Any, datamodule: pl.LightningDataModule | None
) -> None:
    """Let Lightning spread the weights of a module over the processes, if FSDP is the trainer's strategy.

    Raises:
        ValueError: if they cannot be, or if they are and a datamodule comes too late.
    """
    if not spreads(trainer):
        return
    if not is_fsdp(module):
        with (
            attribute_set(trainer, "limit_predict_batches", 0),
            attribute_set(trainer, "callbacks", []),
            attribute_set(trainer, "datamodule", trainer.datamodule),  # type: ignore[attr-defined]
        ):
            served = {"dataloaders": loader} if datamodule is None else {"datamodule": serving(datamodule, loader)}
            trainer.predict(module, return_predictions=False, **served)
    elif datamodule is not None and datamodule is not trainer.datamodule:  # type: ignore[attr-defined]
        raise ValueError(
            "FSDP has spread this model together with another datamodule, whose hooks handle its batches. Pass the new "
            "one's loaders instead (dataloaders=..., train_dataloaders=...), or a new model."
        )
    require_spread(module)


def trace_asked(trainer: pl.Trainer, trace: str | Path | Trace | None) -> Trace:
    """The trace that is passed, or that the last fit of this trainer wrote."""
    if trace is None:
        trace = next((each.trace for each in last_fits(trainer)), None)
    if trace is None:
        why = "fit with TracInCallback among the trainer's callbacks"
        if any(hasattr(each, "recorded_fit") for each in trainer.callbacks):  # type: ignore[attr-defined]
            why = (
                "TracInCallback has recorded nothing in this process, where no fit ran that had a step left to train. "
            )
            why += "Fit with a larger max_epochs"
        raise ValueError(
            f"There is no trace to compute influence from: {why}, or pass the folder of an earlier fit as trace=..."
        )
    if not isinstance(trace, Trace):
        return Trace(trace)
    trace.check_in_place()
    return trace


def last_fits(trainer: pl.Trainer) -> list[RecordedFit]:
    """What each of a trainer's callbacks recorded of its last fit; of one that has not fitted, their last at all."""
    found = (recorded_fit_of(trainer, each) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return [each for each in found if isinstance(each, RecordedFit)]


def datamodule_asked(
    datamodule: pl.LightningDataModule | None, dataloaders: Any, train_dataloaders: Any
) -> tuple[pl.LightningDataModule | None, Any, Any]:
    """The datamodule and the loaders, where a datamodule may stand in the place of loaders, as for ``trainer.test``.

    Returns:
        The datamodule, the test loaders and the training loaders; None for those that it gives.

    Raises:
        TypeError: if something else stands in its own place.
        ValueError: if there are several datamodules, or if it lacks a loader whose place it stands in.
    """
    _require_datamodule(datamodule)
    places = {"datamodule": datamodule, "dataloaders": dataloaders, "train_dataloaders": train_dataloaders}
    given: dict[str, Any] = {name: each for name, each in places.items() if isinstance(each, DATAMODULES)}
    found = list({id(each): each for each in given.values()}.values())
    if len(found) > 1:
        raise ValueError(
            f"Influence needs one datamodule, whose hooks handle all batches, but got one as "
            f"{' and another as '.join(given)}. Pass the loaders of the others."
        )
    if "dataloaders" in given:
        _require_loader(found[0], "test")
        dataloaders = None
    if "train_dataloaders" in given:
        _require_loader(found[0], "train")
        train_dataloaders = None
    return (found[0] if found else datamodule), dataloaders, train_dataloaders


def _require_datamodule(datamodule: Any) -> None:
    if datamodule is None or isinstance(datamodule, DATAMODULES):
        return
    if isinstance(datamodule, type):
        raise TypeError(f"datamodule is the class {datamodule.__name__}. Pass one of it: {datamodule.__name__}(...).")
    raise TypeError(
        f"datamodule must be a LightningDataModule, but got {type(datamodule).__name__}. Pass test examples as "
        "dataloaders=..., and the loader of the training set as train_dataloaders=...."
    )


def loader_of_datamodule(
    trainer: pl.Trainer, datamodule: pl.LightningDataModule, kind: Literal["test", "train"], processes: Processes
) -> Any:
    """A datamodule's test or training loader, set up as Lightning would.

    Raises:
        ValueError: if it has none.
    """
    _require_loader(datamodule, kind)
    if datamodule.trainer is None:
        datamodule.trainer = trainer
    with processes.synchronized():
        if trainer.local_rank == 0:
            datamodule.prepare_data()
    datamodule.setup("test" if kind == "test" else "fit")
    return datamodule.test_dataloader() if kind == "test" else datamodule.train_dataloader()


def has_loader(datamodule: pl.LightningDataModule, kind: Literal["test", "train"]) -> bool:
    """Whether a datamodule has a test or training loader of its own, not that of either Lightning, which raises."""
    name = f"{kind}_dataloader"
    return getattr(getattr(datamodule, name), "__qualname__", "") != f"DataHooks.{name}"


def _require_loader(datamodule: pl.LightningDataModule, kind: Literal["test", "train"]) -> None:
    if not has_loader(datamodule, kind):
        argument = "dataloaders" if kind == "test" else "train_dataloaders"
        raise ValueError(
            f"{type(datamodule).__name__} has no {kind}_dataloader. Give it one, or pass a loader as {argument}=..."
        )


def attached_datamodule(trainer: pl.Trainer, module: nn.Module) -> pl.LightningDataModule | None:
    """The datamodule of the last fit, if that was a fit of this module: its batch hooks belong to the examples."""
    return trainer.datamodule if module is trainer.lightning_module else None  # type: ignore[attr-defined]
