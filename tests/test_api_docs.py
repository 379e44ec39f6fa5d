"""The code of docs/api.md runs, and it names all that is public."""

import re
from pathlib import Path

from conftest import write_pictures

import snello

DOCS = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("photos"), {"cat": 10, "dog": 10})
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS, flags=re.S):
        exec(block, names)
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+\.\d\d% after epoch 1", out[0]) and out[1] == "['cat', 'dog']"
    assert sum(line.startswith("photos/") for line in out) == 20
    (message,) = re.findall(r"print\(error\)  # (.*)", DOCS)
    assert out[-1] == message and Path("runs/photos/export.safetensors").is_file()


def test_every_public_name_is_there():
    missing = [name for name in snello.__all__ if not re.search(rf"\b{name}\b", DOCS)]
    assert not missing
