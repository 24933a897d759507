"""Progress through the trainer's own progress bar, for work that Lightning has no loop for."""

from __future__ import annotations

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
