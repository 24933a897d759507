"""Progress through the trainer's own progress bar."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress


@contextmanager
def progress_task(bar: Any, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a task of ``total`` batches in a running progress bar.

    Args:
        bar: ``trainer.progress_bar_callback``: a RichProgressBar or TQDMProgressBar; any other shows nothing.
        description: what the bar says.
        total: number of batches.

    Yields:
        A function to call after each batch.
    """
    progress = getattr(bar, "progress", None)
    if isinstance(progress, Progress):
        task = progress.add_task(f"[white]{description}", total=total)
        try:
            yield lambda: progress.advance(task)
        finally:
            progress.remove_task(task)
    elif hasattr(bar, "init_validation_tqdm"):
        tqdm = bar.init_validation_tqdm()  # placed below the training bar, with the look that the user chose
        tqdm.set_description(description)
        tqdm.reset(total)
        try:
            yield lambda: tqdm.update() and None
        finally:
            tqdm.close()
    else:
        yield lambda: None


def labelled(bar: Any, description: str) -> Any:
    """A copy of a progress bar that says what a pass of ``trainer.predict`` is, and clears away when that is done.

    Args:
        bar: a progress bar callback of Lightning.
        description: what the copy says instead of "Predicting".
    """

    class Labelled(type(bar)):  # type: ignore[misc]
        predict_description = description

        def init_predict_tqdm(self) -> Any:
            tqdm = super().init_predict_tqdm()
            tqdm.leave = False
            return tqdm

        def on_predict_end(self, *arguments: Any) -> None:
            progress = getattr(self, "progress", None)
            if isinstance(progress, Progress):
                for task in progress.task_ids:
                    progress.update(task, visible=False)
            super().on_predict_end(*arguments)

    copied = copy.copy(bar)
    copied.__class__ = Labelled
    return copied
