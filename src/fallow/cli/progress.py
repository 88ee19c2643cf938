"""Progress bars for work that takes seconds."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fallow.cli.options import notes
from fallow.cli.plain import one_line
from fallow.models.importer import Progress as Report


def import_progress() -> Report:
    """A callback for an import that draws a bar on stderr, and takes it away when the import is done."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
    )
    tasks: list[TaskID] = []

    def report(done: int, total: int, what: str) -> None:
        if not tasks:
            tasks.append(bar.add_task("Importing", total=total))
            bar.start()
        bar.update(tasks[0], completed=done, total=total, description=f"Importing: {one_line(what)}")
        if done >= total:
            bar.stop()

    return report
