"""Files of traces and results, as a stranger may have made them: mutated, with checksums made valid again, and read.

:func:`mutated_readings` is run with small numbers by a test, and with large ones by ``make torture``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from mutated_files import MUTATIONS, NothingToMutateError
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import InfluenceResult, Trace, TracInLast, TracInLayer, TracInSum, TracInWE
from lightning_tracin.cli.command import main
from lightning_tracin.gradients.printable import STEERING
from lightning_tracin.scoring.naming import without_normalizing
from lightning_tracin.storage.verification import verify

#: What reading a bad file may end in.
ALLOWED = (ValueError, OSError)

#: Of the processor, and of a clock, which on a busy machine tells only what waits for ever; and of memory.
SECONDS, SECONDS_BY_CLOCK, BYTES = 10, 120, 2**30


@dataclass(frozen=True)
class Original:
    """Something intact to mutate.

    Attributes:
        trace: folder of a trace.
        result: file of a result that was computed from it.
        method: what it was asked by.
        methods: those of the site that are asked again.
    """

    trace: Path
    result: Path
    method: object
    methods: tuple[object, ...]


def originals(folder: Path) -> list[Original]:
    """Traces of all three kinds of sites and caches, in all types, and a result of each."""
    words, last, hidden = TracInWE(), TracInLast(), TracInLayer("hidden")
    settings = [
        ({"dtype": "float32"}, words, None, (words, last)),
        ({"dtype": "float16", "top_words": 3}, TracInWE(precondition="adam", normalize="cosine"), 3, (last,)),
        ({"dtype": "int8", "cache": "training"}, TracInSum((words, last), mix=(1, 0.5)), None, (words,)),
        ({"dtype": "float16", "methods": ("hidden", "tracin-last"), "projection": (2, 2)}, hidden, 4, (last,)),
        (
            {"dtype": "int8", "methods": ("tracin-we", "hidden")},
            hidden,
            None,
            (TracInLayer("hidden", precondition="adam"), TracInLayer("hidden", precondition="kfac", rank=(4, 4))),
        ),
    ]
    found = []
    for number, (options, method, k, methods) in enumerate(settings):
        place = folder / str(number)
        trainer = fitted(place / "trace", **options)
        asked = {"a": loader(test_texts()), "b": loader(test_texts())} if number % 2 else loader(test_texts())
        result = trainer.influence(asked, method=method, k=k).save(place / "result.safetensors")
        found.append(Original(place / "trace", result, method, (method, *methods)))
    return found


def mutated_readings(n: int, seed: int, folder: Path) -> Counter:
    """Mutate files and read everything back.

    Args:
        n: how many readings, at least; each mutation is read in several ways, every fourth in all.
        seed: of what is mutated and how.
        folder: an empty folder for the files.

    Returns:
        How many readings ended well ("read"), in an error of a kind that is allowed ("refused"), and in what must not
        be: "foreign: ..." (another exception), "not a number: ...", "slow: ...", "large: ...", "unnamed: ..." (an error
        that does not name the file). Those others are also printed.
    """
    logging.disable(logging.WARNING)  # what trainers say of themselves
    try:
        return _mutated_readings(n, random.Random(seed), seed, folder)
    finally:
        logging.disable(logging.NOTSET)


def _mutated_readings(n: int, draw: random.Random, seed: int, folder: Path) -> Counter:
    found: Counter = Counter()
    intact = originals(folder / "intact")
    for number in count():
        if found.total() >= n:
            break
        original = draw.choice(intact)
        place = folder / f"mutated-{number}"  # of its own: a process verifies an unchanged file once
        copies = place / "copied"
        shutil.copytree(original.trace.parent, copies)
        mutate, of = draw.choice(MUTATIONS)
        state = draw.getrandbits(32)
        try:
            what = mutate(random.Random(state), copies, of)
        except NothingToMutateError:
            continue
        concerned = _OF_RESULTS if of in ("", "result.safetensors") else _OF_TRACES
        readers = draw.sample(concerned, 3) if number % 4 else _READERS
        for name, read in readers:
            outcome = _outcome(read, copies, original)
            found[outcome] += 1
            if outcome not in ("read", "refused"):
                print(f"{outcome}\n  in {name}, of {original.trace}, after {what} (mutation {number} of seed {seed})")  # noqa: T201
        shutil.rmtree(place, ignore_errors=True)
    return found


def _outcome(read: Callable[[Path, Original], object], copies: Path, original: Original) -> str:
    """How a reading ended."""
    before, start, start_by_clock = _peak(), time.process_time(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = read(copies, original)
        outcome = f"not a number: {problem}" if problem else "read"
    except ALLOWED as error:
        is_named = isinstance(error, OSError) or str(copies) in str(error) or _is_of_content(str(error))
        outcome = "refused" if is_named else f"unnamed: {type(error).__name__}: {str(error)[:300]}"
    except Exception as error:
        outcome = f"foreign: {type(error).__name__}: {str(error)[:300]}"
    if time.process_time() - start > SECONDS or time.perf_counter() - start_by_clock > SECONDS_BY_CLOCK:
        return "slow"
    return "large" if _peak() - before > BYTES else outcome


def _is_of_content(message: str) -> bool:
    """Whether an error is one that intact files could give as well: about numbers, or about what was recorded."""
    known = (
        "too large for float32",
        "NaN or infinite",
        "did not record",
        "second moments",
        "The trace keeps",
        "no word",
    )
    return any(each in message for each in known)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Readers: each returns None, or what is no number.


def _read_trace(copies: Path, original: Original) -> str | None:
    trace = Trace(copies / "trace")
    str(trace)
    trace.vocabulary  # noqa: B018 (read when it is asked for)
    trace.texts(range(trace.n_train)[:50])
    for checkpoint in trace.checkpoints:
        rates = [checkpoint.learning_rate_of(site) for site in trace.sites]
        if not np.isfinite(rates).all():
            return f"rates {rates}"
        checkpoint.weights()
        for site in trace.sites:
            if checkpoint.has_gradients(site):
                shards = checkpoint.gradients(site)
                for shard in range(min(len(shards), 20)):
                    for name, column in shards.read(shard).columns.items():
                        if not column.isfinite().all():
                            return f"{name} of {site.key}"
            with contextlib.suppress(ValueError):  # none were kept
                checkpoint.second_moments(site)
    return None


def _query(copies: Path, original: Original) -> str | None:
    for method in original.methods:
        result = quiet().influence(loader(test_texts()), Toy(), trace=copies / "trace", method=method)
        if not result.scores.isfinite().all():
            return f"scores of {method}"
    return None


def _self_influence(copies: Path, original: Original) -> str | None:
    scores = quiet().self_influence(trace=copies / "trace", method=without_normalizing(original.method))
    return None if scores.isfinite().all() else "self-influence"


def _label_issues(copies: Path, original: Original) -> str | None:
    issues = quiet().label_issues(trace=copies / "trace", method=without_normalizing(original.method))
    str(issues)
    known = [each.label_score for each in issues.issues if each.label_score is not None]
    return None if all(0 <= score <= 1 for score in known) else "label scores"


def _read_result(copies: Path, original: Original) -> str | None:
    result = InfluenceResult.load(copies / "result.safetensors", copies / "trace")
    str(result)
    for sides in (result.proponents(2), result.opponents(2)):
        if not sides.values.isfinite().all():
            return "values of the strongest"
    result.aggregate("vote", k=1)
    if result._has_words:
        words = [term for row in range(2) for _, term in result.words(row, int(result.proponents(1).indices[row, 0]))]
        table = result.word_table()
        str(table)
        if not (np.isfinite(words).all() and table.values.isfinite().all()):
            return "terms of words"
    result.to_html(copies / "page.html")
    return None


def _read_result_alone(copies: Path, original: Original) -> str | None:
    result = InfluenceResult.load(copies / "result.safetensors")
    result.trace = None  # what the file itself holds is read
    str(result)
    result.rows(2)
    str(result.label_issues())
    result.to_html(copies / "page.html")
    return None


def _verify(copies: Path, original: Original) -> None:
    list(verify(Trace(copies / "trace")))


def _command(*arguments: str) -> Callable[[Path, Original], str | None]:
    def read(copies: Path, original: Original) -> str | None:
        places = {"TRACE": str(copies / "trace"), "RESULT": str(copies / "result.safetensors")}
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            code = main([places.get(each, each) for each in arguments])
        if code not in (0, 1) or "Traceback" in told.getvalue():
            raise AssertionError(f"{arguments} ended with {code}: {told.getvalue()}")
        printed = (out.getvalue() + told.getvalue()).replace("\n", "").replace("\t", "")
        if STEERING.search(printed):
            raise AssertionError(f"{arguments} printed {printed!r}")
        return None

    return read


_OF_TRACES: list[tuple[str, Callable[[Path, Original], str | None]]] = [
    ("Trace", _read_trace),
    ("influence", _query),
    ("self_influence", _self_influence),
    ("label_issues", _label_issues),
    ("verify", _verify),
    ("info", _command("info", "TRACE")),
    ("info --json", _command("info", "TRACE", "--json")),
    ("verify command", _command("verify", "TRACE")),
]
_OF_BOTH: list[tuple[str, Callable[[Path, Original], str | None]]] = [
    ("InfluenceResult with its trace", _read_result),
    ("top", _command("top", "TRACE", "--result", "RESULT", "-k", "2")),
    ("export", _command("export", "RESULT", "--trace", "TRACE", "--csv", "-", "-k", "2")),
]
_OF_RESULTS = [*_OF_BOTH, ("InfluenceResult", _read_result_alone)]
_OF_TRACES += _OF_BOTH
_READERS = [*_OF_TRACES, _OF_RESULTS[-1]]
