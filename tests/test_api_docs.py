"""docs/api.md names all that is public; that its code runs is tried in test_pages.py."""

import re

from helpers.pages import PAGES

import snello


def test_every_public_name_is_there():
    missing = [name for name in snello.__all__ if not re.search(rf"\b{name}\b", PAGES["docs/api.md"])]
    assert not missing
