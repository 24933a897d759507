"""The property tests, with many more examples, drawn anew by each seed."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from product import test_properties

#: Each is a test of its own.
PROPERTIES: dict[str, Callable[..., None]] = {
    name: value for name, value in vars(test_properties).items() if name.startswith("test_")
}


def property_examples(n: int, first_seed: int, folder: Path) -> Counter[str]:
    """Draw examples of all properties, and count those that do not hold; each of these is printed.

    Args:
        n: number of examples, over all properties.
        first_seed: of what is drawn.
        folder: is not used; the examples lie in temporary folders.
    """
    counted: Counter[str] = Counter()
    for name, test in PROPERTIES.items():
        inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

        @functools.wraps(inner)
        def counting(*args: Any, inner: Callable[..., None] = inner, **options: Any) -> None:
            counted["property examples"] += 1
            inner(*args, **options)

        test.hypothesis.inner_test = counting  # type: ignore[attr-defined]
        asked = settings(
            max_examples=max(1, n // len(PROPERTIES)),
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=[*HealthCheck],
        )
        try:
            asked(seed(first_seed)(test))()
        except Exception as error:
            kind = "wrong numbers" if isinstance(error, AssertionError) else "foreign exceptions"
            counted[kind] += 1
            sys.stdout.write(f"{kind}: {name}, seed {first_seed}:\n{traceback.format_exc()}\n")
    return counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    sys.stdout.write(f"{dict(property_examples(given.examples, given.seed, Path()))}\n")
