"""Says whether classes differ much in size."""

from snello.data.sets import PictureSet
from snello.errors import printable

RATIO = 2


def imbalance(pictures: PictureSet) -> str | None:
    """Returns one line where the largest class has more than twice the pictures of the smallest, else None."""
    counts = pictures.counts()
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[largest] <= RATIO * counts[smallest]:
        return None
    without = sum(count == 0 for count in counts.values())
    least = f"{without} without any" if without > 1 else f"{counts[smallest]} of {printable(smallest)}"
    return (
        f"unbalanced classes: {counts[largest]} pictures of {printable(largest)}, {least}; "
        "the balanced accuracy counts each class the same"
    )
