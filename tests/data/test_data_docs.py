"""The names in docs/data.md are all there are; that its commands run is tried in test_pages.py."""

import re
from pathlib import Path

from snello.data import EXTENSIONS
from snello.data.source import PART_NAMES
from snello.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS
from snello.data.torchvision_sets import SETS

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


def test_names():
    for name in (*SETS, *IMAGE_COLUMNS, *LABEL_COLUMNS):
        assert f"`{name}`" in DOCS, name
    assert " ".join(EXTENSIONS) in " ".join(DOCS.split())


def test_names_of_parts():
    text = re.search(r"Parts go by these names, in any case: (.*?)\. ", DOCS, flags=re.S).group(1)
    assert re.findall(r"`(\w+)`", text) == list(PART_NAMES)


def test_sets_with_val_and_without_parts_are_named():
    held_out = re.search(r"Sets that come with a `val` part \((.*?)\)", DOCS, flags=re.S).group(1)
    assert set(re.findall(r"`(\w+)`", held_out)) == {name for name, spec in SETS.items() if "val" in spec.parts}
    whole = {name for name, spec in SETS.items() if "all" in spec.parts}
    assert whole == {"caltech101", "caltech256", "eurosat", "sun397"}
