"""Every setting stands in one group of help."""

import pytest

from snello import cli
from snello.commandline.groups import FIRST, GROUPS, group_of
from snello.commandline.settings import settings_of


@pytest.mark.parametrize("verb", FIRST)
def test_every_setting_is_in_a_group_and_every_first_one_is_there(verb):
    names = [setting.name for setting in settings_of(cli.VERBS[verb].__annotations__["config"])]
    assert [name for name in names if group_of(name) is None] == [], "add them to snello.commandline.groups"
    assert set(FIRST[verb]) <= set(names)


def test_groups_hold_nothing_twice_and_nothing_that_is_gone():
    held = [name for group in GROUPS for name in group.settings]
    fields = {name for verb in FIRST for name in cli.VERBS[verb].__annotations__["config"].__dataclass_fields__}
    assert len(held) == len(set(held)) and set(held) == fields
    assert len({group.name for group in GROUPS}) == len(GROUPS)


def test_a_group_has_the_settings_of_its_dataclass():
    assert group_of("alast.min_budget").name == "alast" == group_of("preset").name
    assert group_of("columns.image").name == "data" and group_of("nothing") is None
