"""Pictures whose activations a codec averaged with each other."""

from collections import defaultdict

from snello.explain.crossing import Cut
from snello.explain.files import Part, thumbnail
from snello.explain.run import Run
from snello.explain.tokens import choose

GROUPS, MEMBERS = 4, 8


def merged(run: Run) -> Part | None:
    """The largest groups of a batch of held-out pictures; None where the codec merges none."""
    if not run.cut:
        return None
    cut = Cut(run)
    if not len(cut.codec.reducers):
        return None
    sent = cut.send([row["index"] for row in choose(run)])  # those that are shown, and others
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in zip(sent.indices, sent.rows.tolist(), strict=True):
        groups[row].append(index)
    largest = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)[:GROUPS]
    if not largest:
        return None
    held_out, files, found = run.held_out, dict[str, bytes](), []
    for group in largest:
        shown = group[:MEMBERS]
        paths = [f"thumbnails/{index}.jpg" for index in shown]
        files |= {path: thumbnail(held_out.open(index)) for path, index in zip(paths, shown, strict=True)}
        found.append({
            "indices": shown,
            "names": [held_out.name(index) for index in shown],
            "labels": [run.classes[held_out.labels[index]] for index in shown],
            "images": paths,
            "size": len(group),
        })  # fmt: skip
    return Part({"codec": run.resolved.codec, "batch": len(sent.indices), "groups": found}, files)
