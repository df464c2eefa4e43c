"""Progress bars."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def progress(*columns: ProgressColumn, transient: bool = True, disable: bool = False) -> Progress:
    """Create a progress bar on standard error, with elapsed and remaining time, followed by any extra columns.

    A transient bar is hidden if standard error is not a terminal, because it would leave an empty line in a log file.
    """
    console = Console(stderr=True)
    console.quiet = disable or (transient and not console.is_terminal)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *columns,
        console=console,
        transient=transient,
        disable=console.quiet,  # rich 14.2 prints an empty line for a quiet console unless the bar is disabled too
    )


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterate over the items with a progress bar."""
    with progress() as bar:
        yield from bar.track(items, total, description=description)


class ProgressBars:
    """Progress callback that shows one bar per description."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, description: str, completed: int, total: int) -> None:
        if description not in self.tasks:
            self.tasks[description] = self.bar.add_task(description, total=total)
        self.bar.update(self.tasks[description], completed=completed)
