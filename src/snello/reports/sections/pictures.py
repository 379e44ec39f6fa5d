"""The section of pictures: which tokens of some held-out pictures are left after each block, frame by frame."""

from typing import Any, NamedTuple

from markupsafe import Markup

from snello.drawing.tokens import token_svg
from snello.reports.facts import Facts

MOST_BYTES = 700_000
"""Of all frames together: with more, every second frame is left out, and again, so that a report stays small."""


class Frame(NamedTuple):
    """A picture's tokens at one place in the model."""

    caption: str
    groups: list[int] | None = None
    """For each patch the token that it is part of, -1 where it was dropped; None: each is a token."""
    lost: list[float | None] | None = None
    """For each patch the share of its token that a codec loses."""


def pictures(facts: Facts) -> dict[str, Any] | None:
    """Eight held-out pictures with the tokens that are left after each block; None where that is not known."""
    found = facts.parts["pictures"]
    if not found or not found.get("pictures"):
        return None
    sequences = [_frames(picture, found.get("cut")) for picture in found["pictures"]]
    grid = (int(found["grid"][0]), int(found["grid"][1]))
    shown = list(range(len(sequences[0])))
    drawn = _draw(found["pictures"], sequences, grid)
    while len(shown) > 3 and sum(len(frames[i]) for frames in drawn for i in shown) > MOST_BYTES:
        shown = [*shown[:-1:2], shown[-1]]
    return {
        "captions": [sequences[0][i].caption for i in shown],
        "left_out": len(sequences[0]) - len(shown),
        "pictures": [
            {
                "number": number,
                "image": facts.image(picture["image"]),
                "name": picture["name"],
                "label": picture["label"],
                "predicted": picture["predicted"],
                "probability": picture["probability"],
                "note": (picture.get("crosses") or {}).get("note"),
                "frames": [drawn[number][i] for i in shown],
            }
            for number, picture in enumerate(found["pictures"])
        ],
        "rule": found.get("rule"),
        "drop_at": found.get("drop_at"),
        "method": found.get("method"),
        "codec": found.get("codec"),
        "cut": found.get("cut"),
        "depth": found.get("depth"),
        "trained": found.get("trained"),
        "files": "report/pictures.json, report/pictures/",
    }


def _frames(picture: dict[str, Any], cut: int | None) -> list[Frame]:
    """What becomes of a picture's tokens, in order; a block that changes nothing has no frame of its own."""
    changes = sorted(picture["blocks"], key=lambda one: int(one["block"]))
    below = [one for one in changes if cut is not None and one["block"] < cut]
    crossed = picture.get("crosses")
    frames = [Frame("the picture, all tokens"), *map(_after, below)]
    if crossed is not None:
        what = "the paler, the more the codec loses" if crossed.get("error") else f"{crossed['tokens']} tokens"
        frames.append(Frame(f"across the cut: {what}", crossed.get("groups"), crossed.get("error")))
    return [*frames, *map(_after, changes[len(below) :])]


def _after(change: dict[str, Any]) -> Frame:
    groups: list[int] = change["groups"]
    return Frame(f"after block {change['block']}: {change['tokens']} of {len(groups)} tokens", groups)


def _draw(found: list[dict[str, Any]], sequences: list[list[Frame]], grid: tuple[int, int]) -> list[list[Markup]]:
    each = list(range(grid[0] * grid[1]))

    def drawn(number: int, name: str, frame: Frame) -> Markup:
        alt = f"{name}: {frame.caption}"
        return Markup(token_svg(f"#picture-{number}", grid, frame.groups or each, alt=alt, lost=frame.lost))

    return [
        [drawn(number, picture["name"], frame) for frame in frames]
        for number, (picture, frames) in enumerate(zip(found, sequences, strict=True))
    ]
