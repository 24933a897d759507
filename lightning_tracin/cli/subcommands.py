"""TracInCLI: fit, and ask for influence, from one configuration file, on LightningCLI.

Needs jsonargparse: ``pip install lightning-tracin[cli]``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    from jsonargparse import Namespace
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lightning_tracin.cli needs jsonargparse: pip install lightning-tracin[cli]") from error

import pytorch_lightning as pl
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI, instantiate_class
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_tracin.gradients.targets import Target
from lightning_tracin.past.trace import Trace
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice
from lightning_tracin.querying.trainer import Trainer
from lightning_tracin.recording.callback import TracInCallback
from lightning_tracin.recording.plan import LAST, WORDS
from lightning_tracin.scoring.methods import Method, TracInLayer
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.storage.files import output_file
from lightning_tracin.storage.trace import Trace as StoredTrace

# The arguments of the trainer's methods that do not come from the command line, or are added here.
_SKIPPED = {"model", "dataloaders", "datamodule", "train_dataloaders", "trace", "method", "checkpoints"}
# What the fit subcommand knows beside, and therefore writes into the configuration that it saves.
_OF_FIT = ("ckpt_path", "weights_only")
_PRINTED = 20


class InfluenceCLIMixin:
    """The subcommands ``influence``, ``self_influence`` and ``label_issues`` for a subclass of any LightningCLI.

    Its trainer class must have the methods of :class:`~lightning_tracin.querying.trainer.InfluenceTrainerMixin`.

    Example::

        import lightning.pytorch as L
        from lightning.pytorch.cli import LightningCLI
        from lightning_tracin import InfluenceTrainerMixin
        from lightning_tracin.cli import InfluenceCLIMixin

        class Trainer(InfluenceTrainerMixin, L.Trainer):
            pass

        class CLI(InfluenceCLIMixin, LightningCLI):
            pass

        CLI(Classifier, News, trainer_class=Trainer)
    """

    config: Any
    config_init: Any
    trainer: Any

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """The subcommands, and the arguments of the trainer's methods that are no options."""
        skipped: dict[str, set[str]] = super().subcommands()  # type: ignore[misc]
        return {**skipped, "influence": _SKIPPED, "self_influence": _SKIPPED, "label_issues": {*_SKIPPED, "texts"}}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parsers; :meth:`init_parser` is told which are for the subcommands that are added here."""
        added = {
            "influence": _add_influence_arguments,
            "self_influence": _add_self_influence_arguments,
            "label_issues": _add_label_issues_arguments,
        }
        for subcommand, add_arguments in added.items():
            given = subparser_kwargs.get(subcommand, {})
            subparser_kwargs = {**subparser_kwargs, subcommand: {**given, "add_arguments": add_arguments}}
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)  # type: ignore[misc]

    def init_parser(
        self, *, add_arguments: Callable[[LightningArgumentParser], None] | None = None, **kwargs: Any
    ) -> LightningArgumentParser:
        """A parser; Lightning has no other place for arguments of one subcommand alone."""
        parser: LightningArgumentParser = super().init_parser(**kwargs)  # type: ignore[misc]
        if add_arguments is not None:
            add_arguments(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, and check the method and the target before anything is loaded."""
        super().parse_arguments(parser, args)  # type: ignore[misc]
        subcommand = self.config.get("subcommand")
        if subcommand not in ("influence", "self_influence", "label_issues"):
            return
        options = self.config[subcommand]
        options.ckpt_path = None  # the model's arguments would be taken from it
        try:
            _method(options.method)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            parser.error(f'Parser key "method": {error}')
        try:
            Target.of(options.get("target", "label"), options.get("positions"))
        except (TypeError, ValueError) as error:
            parser.error(f'Parser key "target": {error}')

    def influence(self, model: pl.LightningModule, **options: Any) -> None:
        """Score the examples of the datamodule's ``test_dataloader``, and write, or print, the result."""
        asked = self.config_init["influence"]
        trace, checkpoints = self._trace_and_checkpoints("influence", model, options)
        result = self.trainer.influence(
            model=model, trace=trace, method=_method(asked.method), checkpoints=checkpoints, **options
        )
        if not self.trainer.is_global_zero:
            return
        if asked.output is not None:
            result.save(asked.output)
        if asked.html is not None:
            result.to_html(asked.html)
        if asked.output is None and asked.html is None:
            Console().print(result)

    def self_influence(self, model: pl.LightningModule, **options: Any) -> None:
        """Score the training examples on themselves, and write all, or print some, from the highest score on."""
        asked = self.config_init["self_influence"]
        trace, checkpoints = self._trace_and_checkpoints("self_influence", model, options)
        scores = self.trainer.self_influence(
            model, trace=trace, method=_method(asked.method), checkpoints=checkpoints, **options
        )
        order = scores.argsort(descending=True, stable=True)
        if not self.trainer.is_global_zero:
            return
        if asked.output is not None:
            _write_csv(scores, order, Path(asked.output))
        else:
            Console().print(_table(scores, order))

    def _trace_and_checkpoints(
        self, subcommand: str, model: pl.LightningModule, options: Mapping[str, Any]
    ) -> tuple[str | Path | StoredTrace | None, CheckpointChoice]:
        """The trace, which is made first where files of checkpoints are named, and which of its checkpoints count."""
        asked = self.config_init[subcommand]
        choice, files = _checkpoint_choice(asked.checkpoints)
        if not files:
            if asked.learning_rates is not None:
                raise ValueError("--learning_rates goes with the files of checkpoints (--checkpoints a.ckpt b.ckpt).")
            return asked.trace or self._recorded_trace(subcommand), choice
        if asked.trace is None:
            raise ValueError("A trace is made of the files of --checkpoints: say in which folder by --trace.")
        if self.trainer.world_size > 1:
            raise ValueError("A trace of past checkpoints is made by one process: use --trainer.devices 1.")
        layers = [each.method.name for each in _method(asked.method).summands if isinstance(each.method, TracInLayer)]
        trace = Trace.from_checkpoints(
            asked.trace,
            files,
            model,
            options.get("datamodule"),
            learning_rates=asked.learning_rates,
            methods=(WORDS, LAST, *layers),
        )
        return trace, None

    def label_issues(self, model: pl.LightningModule, **options: Any) -> None:
        """Find training examples whose labels may be wrong, and write all as CSV, or print some."""
        asked = self.config_init["label_issues"]
        trace, checkpoints = self._trace_and_checkpoints("label_issues", model, options)
        issues = self.trainer.label_issues(
            model, trace=trace, method=_method(asked.method), checkpoints=checkpoints, **options
        )
        if not self.trainer.is_global_zero:
            return
        if asked.output is not None:
            issues.to_csv(asked.output)
        else:
            Console().print(issues)

    def _recorded_trace(self, subcommand: str) -> Path | None:
        """Where the callback of the configuration wrote its trace, if it tells."""
        callbacks = [each for each in self.trainer.callbacks if isinstance(each, TracInCallback)]
        if len(callbacks) != 1:
            return None
        if callbacks[0].plan.dirpath is not None:
            return callbacks[0].plan.dirpath
        beside = [Path(os.fspath(path)).parent / "trace" for path in self.config[subcommand].config or ()]
        return next((path for path in beside if (path / "trace.json").exists()), None)


class TracInCLI(InfluenceCLIMixin, LightningCLI):
    """LightningCLI with the subcommands ``influence``, ``self_influence`` and ``label_issues``.

    Weights come from the trace's checkpoints; no other checkpoint is loaded. Without ``--trace``, the trace is where
    the TracInCallback of the configuration wrote it: in its ``dirpath``, or beside the configuration file that the
    fit saved in the logger's folder. The callback itself does nothing then.

    It takes the arguments of LightningCLI. ``trainer_class`` is :class:`lightning_tracin.Trainer` by default. With
    ``lightning.pytorch``, see :class:`InfluenceCLIMixin`.

    Example::

        # main.py
        from lightning_tracin.cli import TracInCLI

        if __name__ == "__main__":
            TracInCLI(Classifier, News)

        # python main.py fit -c config.yaml
        # python main.py influence -c config.yaml --trace trace --output result.safetensors
        # python main.py influence -c lightning_logs/version_0/config.yaml --k 10
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"trainer_class": Trainer, **kwargs})


def _add_influence_arguments(parser: LightningArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument(
        "--output", type=str | None, help="Write the result to this file, usually *.safetensors, and do not print it."
    )
    parser.add_argument("--html", type=str | None, help="Write a page to this file, and do not print the result.")


def _add_self_influence_arguments(parser: LightningArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument(
        "--output", type=str | None, help=f"Write the scores to this CSV file, and do not print the {_PRINTED} highest."
    )


def _add_label_issues_arguments(parser: LightningArgumentParser) -> None:
    _add_common_arguments(parser, method="tracin-last")
    parser.add_argument(
        "--output", type=str | None, help="Write the table to this CSV file, to review and correct; do not print it."
    )


def _add_common_arguments(parser: LightningArgumentParser, method: str = "tracin-we") -> None:
    parser.add_argument(
        "--trace",
        type=str | None,
        help="Folder that the fit recorded, by default that of the configuration's TracInCallback; or where a trace is "
        "made of the files of --checkpoints.",
    )
    parser.add_argument(
        "--method",
        # not the classes themselves: jsonargparse takes dataclasses of a union for each other
        type=str | dict[str, Any],
        default=method,
        help='"tracin-we", "tracin-last", or class_path and init_args of lightning_tracin.TracInWE, .TracInLast, '
        ".TracInLayer, .TracInSum or .TracInRidge, whose parts or method are given in the same way.",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        type=int | str | list[int],
        help='Which checkpoints of the trace count: "last", or steps; all by default. Or files of a run that is over '
        "(.ckpt, folders of Hugging Face's Trainer, state dicts), of which the trace is made, in the folder --trace. "
        "In a configuration file, a list.",
    )
    parser.add_argument(
        "--learning_rates",
        type=list[float] | None,
        help="With files of checkpoints, the learning rate of each, in their order, where the files do not tell; those "
        "of a folder are in the order of their steps.",
    )
    for name in _OF_FIT:
        parser.add_argument(
            f"--{name}",
            type=Any,
            help="Not used: weights come from the trace. It is here so that a configuration saved by fit can be read.",
        )


def _method(given: str | dict[str, Any] | Namespace | Method) -> Method:
    """The method that was asked for; the parts of a sum are given like it, parsed or instantiated by jsonargparse."""
    given = given.as_dict() if isinstance(given, Namespace) else given
    if not isinstance(given, dict):
        return method_of(given)
    if "class_path" not in given:
        raise ValueError(f"a method with options needs class_path and init_args, but got {given}.")
    if "." not in given["class_path"]:  # as jsonargparse takes the names of classes that it knows
        given = {**given, "class_path": f"lightning_tracin.{given['class_path']}"}
    options = dict(given.get("init_args", {}))
    if isinstance(options.get("parts"), list):
        options["parts"] = [_method(part) for part in options["parts"]]
    if "method" in options:
        options["method"] = _method(options["method"])
    return method_of(instantiate_class((), {**given, "init_args": options}))


def _checkpoint_choice(given: list[Any] | None) -> tuple[CheckpointChoice, list[str]]:
    """Which of a trace's checkpoints count, and the files to make a trace of, if it is those that are named.

    Raises:
        ValueError: if it is a mixture.
    """
    named = [each for item in given or () for each in (item if isinstance(item, list) else [item])]
    if not named:
        return None, []
    if named in (["last"], ["all"]):
        return str(named[0]), []
    if len({type(each) for each in named}) > 1 or {"last", "all"} & set(named):
        raise ValueError(f'--checkpoints takes "last", "all", steps, or files, but got {named}.')
    return (None, named) if isinstance(named[0], str) else (named, [])


def _write_csv(scores: Tensor, order: Tensor, path: Path) -> None:
    """Write training examples and their scores, in an order."""
    with output_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["train_index", "self_influence"])
        writer.writerows(zip(order.tolist(), scores[order].tolist(), strict=True))


def _table(scores: Tensor, order: Tensor) -> Table:
    """The first training examples of an order, and their scores."""
    table = Table("train", "self-influence", caption=f"{_PRINTED} of {len(order)}" if len(order) > _PRINTED else None)
    for index in order[:_PRINTED].tolist():
        table.add_row(str(index), f"{scores[index]:.3g}")
    return table
