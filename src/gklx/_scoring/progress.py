"""A progress bar on the standard error stream, or nothing."""

import io
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from .streams import say


class Progress:
    """The progress bar of a run, on a terminal."""

    def __init__(self, samples: int | None, *, shown: bool) -> None:
        self._samples, self._shown = samples, shown
        # If standard error is closed, `sys.stderr` is None, and rich would write to standard output.
        console = Console(file=sys.stderr or io.StringIO(), highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._tasks: dict[str, TaskID] = {}
        self._ended = False

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Removes the bar and restores the standard streams, which rich redirects while it is shown."""
        if not self._ended:
            self._ended = True
            self._bar.stop()

    def at(self, stage: str, samples: int) -> None:
        """Shows how many samples a stage has done."""
        if stage not in self._tasks:
            # A resumed run starts at its first own sample, so that the rate counts only those computed now.
            self._tasks[stage] = self._bar.add_task(stage, total=self._samples, completed=samples)
        self._bar.update(self._tasks[stage], completed=samples)

    def note(self, text: str) -> None:
        """Prints a line above the bar; also where standard error is no terminal."""
        if self._shown:
            say(text)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Samples a second."""
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")
