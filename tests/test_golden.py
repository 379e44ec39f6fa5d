"""Short runs compute what they did before, to the bit: losses, weights, bytes (tools/golden.py makes them anew)."""

import json
from pathlib import Path

import pytest
from golden import FILE, fingerprint, names, result

pytestmark = pytest.mark.slow

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", names())
def test_a_run_is_what_it_was(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    here = fingerprint()
    if here != GOLDEN["fingerprint"]:
        differ = [key for key in here if here[key] != GOLDEN["fingerprint"].get(key)]
        pytest.skip(f"made elsewhere ({', '.join(differ)} differ): python tools/golden.py makes them for this machine")
    assert result(name, tmp_path) == GOLDEN["runs"][name]
