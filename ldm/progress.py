"""The progress bar of long work."""

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


def progress(*more: ProgressColumn, transient: bool = True, disable: bool = False) -> Progress:
    """A bar on standard error, with the time spent and the time left; `more` columns come after these.

    In a log file a transient bar would leave an empty line, and is not shown.
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
        *more,
        console=console,
        transient=transient,
        disable=console.quiet,  # alone it would still print an empty line in rich 14.2
    )


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """The same items, with a bar that tells how many are done."""
    with progress() as bar:
        yield from bar.track(items, total, description=what)


class Bars:
    """A bar for each thing that reports its progress."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done)
