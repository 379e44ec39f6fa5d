"""`snello join` from its start to what it leaves, where the rest of the tests look at sessions and frames only."""

import shlex
from dataclasses import replace

import pytest
from conftest import QUIET, rows_of
from helpers.budgets import DROPPING
from helpers.clients import serve_config
from helpers.servers import Running, join_config

from snello import cli
from snello.config import AlastConfig, JoinConfig, SplitConfig
from snello.errors import CheckpointError
from snello.finetuning import finetune
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved, ServerAddress
from snello.split.client.join import RemoteSession, join
from snello.split.client.place import RemotePlace

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
