"""Which held-out pictures a model takes for something else, and which it was hardly sure of."""

from snello.errors import DataError
from snello.explain.files import Part, thumbnail
from snello.explain.run import Row, Run

WRONG, UNSURE = 16, 8


def mistakes(run: Run) -> Part:
    """The most confident mistakes, and the pictures that were recognised with the least confidence.

    Raises:
        DataError: where nothing is known of what the model says.
    """
    rows = run.predictions
    if not rows:
        where = "the other half of the model is on a server, and nothing was noted in training"
        raise DataError(f"what the model says of held-out pictures is not known: {where}")
    wrong = sorted((row for row in rows if row["predicted"] != row["label"]), key=_sureness, reverse=True)[:WRONG]
    unsure = sorted((row for row in rows if row["predicted"] == row["label"]), key=_sureness)[:UNSURE]
    files = {_path(row): thumbnail(run.held_out.open(row["index"])) for row in [*wrong, *unsure]}
    values = {
        "wrong": [_named(run, row) for row in wrong],
        "unsure": [_named(run, row) for row in unsure],
        "pictures": len(rows),
    }
    return Part(values, files)


def _sureness(row: Row) -> float:
    return float(row["top"][0][1])


def _path(row: Row) -> str:
    return f"thumbnails/{row['index']}.jpg"


def _named(run: Run, row: Row) -> Row:
    names = {"label_name": run.classes[row["label"]], "predicted_name": run.classes[row["predicted"]]}
    return {**row, **names, "image": _path(row)}
