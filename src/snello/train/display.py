"""What a run shows on the console: a bar, snello's own warnings as one line, and what to know of the toy."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from snello.config.default_model import TOY
from snello.data import PictureSet, typical_size
from snello.errors import SnelloWarning


@contextmanager
def progress_bar(console: Console, *, total: int, completed: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of `total` steps of which `completed` are done; yields what sets their number and the text beside it."""
    narrow, whole = Column(max_width=20), Column(no_wrap=True)  # where there is little room the bar gives way
    columns = (
        BarColumn(bar_width=None, table_column=narrow),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(table_column=whole),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, completed=completed, said="")
        yield lambda done, said: bar.update(task, completed=done, said=said)


def toy_note(model: str, pictures: PictureSet, side: int, is_served: bool) -> str | None:
    """One line where the toy that ships with snello sees pictures, at `side` pixels, much smaller than they are."""
    size = typical_size(pictures) if model == TOY else None
    if size is None or min(size) <= 2 * side:
        return None
    where = " of `snello serve`" if is_served else ""
    return (
        f"warning: {TOY} is a toy: it sees these pictures, of about {size[0]} x {size[1]}, at {side} x {side} "
        f"pixels; for results name a pretrained --model{where} (docs/models.md)"
    )


def say(console: Console, text: str) -> None:
    """Prints a line as it is: names of folders may hold what rich takes for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_on(console: Console) -> Iterator[None]:
    """Prints snello's own warnings as one line on `console`."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, SnelloWarning):
                say(console, f"warning: {message}")
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield
