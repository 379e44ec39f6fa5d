"""`snello join` from its start to what it leaves, where the rest of the tests look at sessions and frames only."""

import io
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import QUIET, rows_of, write_pictures
from helpers.budgets import DROPPING
from helpers.clients import serve_config
from helpers.servers import Running, join_config
from rich.console import Console

from snello import cli
from snello.config import AlastConfig, JoinConfig, SplitConfig
from snello.errors import CheckpointError
from snello.finetuning import finetune
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved, ServerAddress
from snello.split.client.join import RemoteSession, join
from snello.split.client.place import RemotePlace
from snello.split.server import command as serving

pytestmark = pytest.mark.slow


def test_alast_on_the_server_alone(pictures, tmp_path):
    """The client has no budgets to draw; docs/split.md recommends the setting."""
    split = SplitConfig(cut=3, codec="int8", alast="server")
    config = serve_config(method="alast", alast=AlastConfig(**DROPPING, alpha=5.0), epochs=1)
    with Running(replace(config, split=split), tmp_path / "server") as server:
        summary = join(join_config(server, pictures, tmp_path / "client"), QUIET)
    assert summary.method == "alast" and summary.traffic is not None and summary.steps == 7
    assert not (tmp_path / "client" / "budgets.png").exists() and (tmp_path / "client" / "traffic.png").exists()
    (session,) = (tmp_path / "server" / "sessions").iterdir()
    assert all(len(row["budgets"]) == 3 for row in rows_of(session, "step"))


def test_a_run_is_resumed_as_it_was_started(pictures, tmp_path):
    """How long to try again stays what it was, and finetune does not take the run for its own."""
    with Running(serve_config(epochs=1), tmp_path / "server") as server:
        config = join_config(server, pictures, tmp_path / "client", reconnect_seconds=7.0, patience_seconds=50.0)
        session = RemoteSession(config, console=QUIET)
        session.run(2)
        session.close()
        args = ["--out", str(tmp_path / "client"), "--resume"]
        again = cli._default(JoinConfig, [server.address, *args])
        assert again is not None and (again.reconnect_seconds, again.patience_seconds) == (7.0, 50.0)
        assert cli.main(["finetune", *args]) == 2
        with pytest.raises(CheckpointError, match="is a run of `snello join`"):
            finetune(replace(RunFolder(tmp_path / "client").read()[0], out=tmp_path / "client", resume=True), QUIET)
        command = shlex.split(session.place.command())
        assert command == ["snello", "join", server.address, *args]
        assert cli.main(command[1:]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "client", "step")] == list(range(1, 8))


def test_the_command_to_resume_has_all_that_was_given(small, tmp_path):
    server = ServerAddress(
        "server.example:7443",
        "0" * 32,
        insecure_plaintext_for_everyone_on_the_network_to_read=True,
    )
    options = {"architecture": None, "classes": ("a",), "open_connection": lambda *a, **k: None, "console": QUIET}
    place = RemotePlace(small, RunFolder(tmp_path / "a b"), Resolved(server=server), server=server, **options)
    assert place.command() == (
        f"snello join server.example:7443 --insecure-plaintext-for-everyone-on-the-network-to-read "
        f"--out '{tmp_path}/a b' --resume"
    )
    secured = ServerAddress("server.example:7443", "0" * 32, certs="certs", name="ward-3")
    place = RemotePlace(small, RunFolder(tmp_path), Resolved(server=secured), server=secured, **options)
    assert "--certs certs --name ward-3" in place.command()


def test_a_toy_says_that_it_is_one_on_both_sides(tmp_path):
    """To the client only where its pictures are much larger; at its end are the verdict and what to do next."""
    write_pictures(tmp_path / "photos", {"a": 4, "b": 4}, size=80)
    toy = {"model": "vit_micro_patch4_32", "image_size": None, "epochs": 1}
    console = Console(file=io.StringIO(), record=True, width=80)
    with Running(serve_config(**toy), tmp_path / "server") as server:
        join(join_config(server, tmp_path / "photos", tmp_path / "client"), console)
        listening = SimpleNamespace(precision="fp32", device="cpu", run=SimpleNamespace(path="runs/server"))
        serving._announce(server.registry.config, listening, "127.0.0.1", 7443, False, console)
    said = console.export_text().splitlines()
    (line,) = [line for line in said if line.startswith("warning: ")]
    assert "is a toy: it sees these pictures, of about 80 x 80, at 32 x 32 pixels" in line
    assert line.endswith("name a pretrained --model of `snello serve` (docs/models.md)")
    assert "  train longer:       more --epochs of `snello serve`, then join it anew" in said
    assert said[-1] == "vit_micro_patch4_32 is a toy, to try things with: another with --model NAME"
    assert any(line.startswith("accuracy ") and line.endswith(" on 2 held-out pictures") for line in said)
