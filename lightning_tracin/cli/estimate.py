"""``lightning-tracin estimate``: what a trace will take on disk, by numbers, a model's configuration, or another trace.

The formula is that of a fit's own first line (``lightning_tracin/storage/sizes.py``, docs/costs.md).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from lightning_tracin.cli.argument_types import path
from lightning_tracin.cli.model_size import TASKS, ModelSize, size_of_model
from lightning_tracin.gradients.printable import printable
from lightning_tracin.storage.sizes import (
    LABEL_BYTES,
    NUMBER_BYTES,
    TOKEN_BYTES,
    LayerSize,
    TraceSize,
    distinct_words,
    moments_size,
)

NOTES = """\
example:
  lightning-tracin estimate --examples 200k --tokens 128 --hidden 768 --vocab 30522 --parameters 110M --checkpoints 3
  lightning-tracin estimate --examples 200k --model path/to/bert --task sequence-classification --json
  lightning-tracin estimate --examples 200k --parameters 1.2B --trainable 5M --hidden 2048 --vocab 128k \\
      --language-model --methods tracin-we --top-words 20
  lightning-tracin estimate --trace trace --examples 1M --checkpoints 5

Numbers may end with k, M or B. A folder of a Hugging Face model (its config.json) tells sizes by itself; so does a
trace of the same model with the same options. The formula is in docs/costs.md."""

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKMB]?)")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_LAYER = re.compile(r"([0-9]+)x([0-9]+)")
_OF_MODEL = ("parameters", "hidden", "vocab")
_METHODS = ("tracin-we", "tracin-last")
_OF_SIZES = ("classes", "labelled", "trainable", "tokens", "words")
_OF_STORAGE = ("weights", "no_weights", "no_moments", "methods", "dtype", "top_words", "projection", "rank")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``lightning-tracin estimate``."""

    def number(name: str, help_text: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", metavar="N", type=quantity, help=help_text, **options)

    number("examples", "training examples that are drawn before a checkpoint")
    number("checkpoints", "checkpoints of the fit (1 by default)")
    number("tokens", "tokens of an example, on the mean (128 by default)")
    number("words", "different tokens of an example; by default judged from --tokens by Zipf's law")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FOLDER", type=path, help="a Hugging Face model's, with its config.json")
    source.add_argument("--trace", metavar="TRACE", type=path, help="a trace of the same model with the same options")
    parser.add_argument("--task", choices=sorted(TASKS), help="what the model of --model does, if it does not say")
    number("labelled", "tokens with a label, of a language model (all by default; of masked ones 15 %%)")
    number("parameters", "parameters of the model, tied ones once")
    number("trainable", "those that training moves (LoRA); all by default")
    number("hidden", "numbers in a row of the word embedding table")
    number("vocab", "rows of the word embedding table")
    number("classes", "outputs of a classifier (2 by default)")
    parser.add_argument("--language-model", action="store_true", help="the last layer is a tied head at every token")
    parser.add_argument("--weights", choices=("float32", "float16", "bfloat16"), help="their type (float32 by default)")
    parser.add_argument("--no-weights", action="store_true", help="keep_weights=False")
    parser.add_argument("--no-moments", action="store_true", help="the optimizer is not of the Adam family")
    parser.add_argument(
        "--methods",
        metavar="METHOD",
        nargs="+",
        help="tracin-we, tracin-last (these two by default), or OUTxIN for a linear layer that every token goes "
        "through, such as 3072x768",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "int8"), help="of gradients (float16 by default)")
    number("top-words", "store only so many words of each example")
    parser.add_argument("--projection", metavar="N", type=quantity, nargs="+", help="one number, or two")
    parser.add_argument("--rank", metavar="N", type=quantity, nargs=2, help="K-FAC's components, of inputs and outputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object; sizes are in bytes")


def quantity(text: str) -> int:
    """A number from 1 on, which may end with k, M or B.

    Raises:
        ArgumentTypeError: if it is none.
    """
    found = _QUANTITY.fullmatch(text)
    value = 0 if found is None else round(float(found[1]) * _FACTORS[found[2]])
    if not 1 <= value <= 10**15:
        raise ArgumentTypeError(f"expected a number from 1 on, such as 200k or 1.2B, but got {text!r}")
    return value


def estimated(arguments: Namespace) -> TraceSize:
    """The size of a trace that the arguments ask about.

    Raises:
        SystemExit: if they contradict each other, or say too little.
        FileNotFoundError: if there is no such model or trace.
        ValueError: if a model or trace is not what is needed.
    """
    if arguments.trace is not None:
        _require_unused(arguments, "trace", (*_OF_MODEL, *_OF_SIZES, *_OF_STORAGE, "language_model", "task"))
        from lightning_tracin.cli.measured_size import size_like_trace

        return size_like_trace(arguments.trace, arguments.examples, arguments.checkpoints)
    if arguments.examples is None:
        arguments.usage_error("--examples is needed: how many training examples there are")
    classes = arguments.classes or 2
    if arguments.model is not None:
        _require_unused(arguments, "model", (*_OF_MODEL, "language_model"))
        return _size(arguments, size_of_model(arguments.model, arguments.task, classes))
    if arguments.task is not None:
        arguments.usage_error("--task says what the model of --model FOLDER does, which is missing")
    missing = [f"--{name}" for name in _OF_MODEL if getattr(arguments, name) is None]
    if missing:
        arguments.usage_error(f"{', '.join(missing)} needed, or --model FOLDER, or --trace TRACE")
    writes, hidden = arguments.language_model, arguments.hidden
    outputs, inputs = (arguments.vocab, hidden) if writes else (classes, hidden + 1)
    model = ModelSize(arguments.parameters, hidden, arguments.vocab, outputs, inputs, writes, is_tied=writes)
    return _size(arguments, model)


def _require_unused(arguments: Namespace, source: str, names: Sequence[str]) -> None:
    """Check that nothing is given that another source of sizes has told already.

    Raises:
        SystemExit: if something is.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) not in (None, False)]
    if given:
        arguments.usage_error(f"{', '.join(given)} would change nothing beside --{source}, which tells that itself")


def _size(arguments: Namespace, model: ModelSize) -> TraceSize:
    """The size of the trace of a model.

    Raises:
        SystemExit: if arguments contradict each other, or say what does not count.
        ValueError: if there is no such method.
    """
    for name, counts in (("labelled", model.writes), ("classes", arguments.classes == model.outputs)):
        if getattr(arguments, name) is not None and not counts:
            place = "token" if model.writes else "example"
            arguments.usage_error(
                f"--{name} would change nothing: the last layer has {model.outputs} outputs, once for each {place}"
            )
    tokens, n_train = arguments.tokens or 128, arguments.examples
    words = min(arguments.words or distinct_words(model.vocab, tokens), tokens)
    trainable = min(arguments.trainable or model.parameters, model.parameters)
    kept = (not arguments.no_weights) * NUMBER_BYTES[arguments.weights or "float32"]
    projection = _projection(arguments)
    if arguments.rank and isinstance(projection, tuple):
        arguments.usage_error("--rank and --projection both make gradients of linear layers smaller: use one of them")
    rank = tuple(arguments.rank) if arguments.rank else None
    from lightning_tracin.storage.encoding import StorageOptions  # loads torch, which `--help` need not wait for

    options = StorageOptions(arguments.dtype or "float16", arguments.top_words, projection, rank)
    methods = dict.fromkeys(arguments.methods or _METHODS)
    layers = {name: _layer(arguments, name, model, words, tokens) for name in methods}
    for name, layer in layers.items():
        if layer.has_words and isinstance(projection, int) and projection >= model.hidden:
            arguments.usage_error(f"--projection {projection} saves nothing: {name} has {model.hidden} numbers a word")
    moments = 0.0
    if not arguments.no_moments:
        all_trained = trainable == model.parameters
        for name, layer in layers.items():
            if layer.has_words and all_trained:
                rows = model.vocab if model.is_tied else distinct_words(model.vocab, n_train * words)
                moments += moments_size(rows, model.hidden, numbered=True)
            elif not layer.has_words and (all_trained or (name == "tracin-last" and not model.writes)):
                moments += moments_size(*layer.widths)
    return TraceSize(
        weights=kept * trainable,
        frozen=kept * (model.parameters - trainable),
        moments=moments,
        gradients={name: options.nbytes(layer) for name, layer in layers.items()},
        texts=n_train * (LABEL_BYTES + TOKEN_BYTES * tokens),
        n_train=n_train,
        drawn=n_train,
        checkpoints=arguments.checkpoints or 1,
        components=sum(map(options.components, layers.values())),
    )


def _layer(arguments: Namespace, name: str, model: ModelSize, words: float, tokens: int) -> LayerSize:
    """How large gradients are where a method takes them."""
    if name == "tracin-we":
        return LayerSize([words], (model.hidden,))
    if name == "tracin-last":
        labelled = arguments.labelled or model.labelled * tokens
        return LayerSize([labelled if model.writes else 1], (model.outputs, model.inputs))
    found = _LAYER.fullmatch(name)
    if found is not None:
        return LayerSize([tokens], (int(found[1]), int(found[2]) + 1))
    raise ValueError(f"--methods takes tracin-we, tracin-last, and sizes such as 3072x768, but got {name!r}.")


def _projection(arguments: Namespace) -> int | tuple[int, int] | None:
    sizes = arguments.projection or []
    if len(sizes) > 2:
        arguments.usage_error(f"--projection takes one number, or two, but got {len(sizes)}")
    return None if not sizes else sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def as_json(size: TraceSize) -> dict[str, Any]:
    """A trace's size as JSON, in bytes."""
    number = size.checkpoints or 1
    return {
        "examples": round(size.drawn),
        "checkpoints": number,
        "checkpoint": {
            "weights": round(size.weights),
            "moments": round(size.moments),
            "components": round(size.components),
            "texts": round(size.texts) if size.texts_each else 0,
            "gradients": {name: round(size.drawn * each) for name, each in size.gradients.items()},
        },
        "example": {name: round(each) for name, each in size.gradients.items()},
        "once": {"frozen_weights": round(size.frozen), "texts": 0 if size.texts_each else round(size.texts)},
        "total": round(size.of(number)),
    }


def size_table(size: TraceSize) -> Table:
    """A trace's size, part by part."""
    number = size.checkpoints or 1
    table = Table(box=None, pad_edge=False)
    for column in ("", "an example", "a checkpoint", f"{number} checkpoint{'s' * (number > 1)}"):
        table.add_column(column, justify="right" if column else "left")

    def add(name: str, of_example: float | None, of_checkpoint: float | None, of_all: float) -> None:
        shown = ["" if each is None else decimal(round(each)) for each in (of_example, of_checkpoint, of_all)]
        table.add_row(name, *shown)

    add("weights", None, size.weights, number * size.weights)
    if size.frozen:
        add("frozen weights", None, None, size.frozen)
    add("moments", None, size.moments, number * size.moments)
    if size.components:
        add("components", None, size.components, number * size.components)
    for name, each in size.gradients.items():
        add(printable(f"gradients {name}"), each, each * size.drawn, number * each * size.drawn)
    if size.texts_each:
        add("texts", size.texts / size.drawn, size.texts, number * size.texts)
    else:
        add("texts", size.texts / size.n_train, None, size.texts)
    add("all", None, size.checkpoint, size.of(number))
    return table
