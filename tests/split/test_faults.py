"""Training across a network where something breaks: processes, connections, disks, certificates, the user's patience.

Servers and clients are real processes that talk through a proxy. Whatever happens, a run that is brought to its end
has the weights, the loss curve and the byte counts of one that nothing happened to. FAULT_TABLE names a file for a
table of all faults, and what they cost.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import free_port, rows_of, write_pictures
from helpers.processes import Child, Wrong, until
from proxy import Proxy, Rule

from snello.config import CertsConfig
from snello.files import load_tensors
from snello.split.checkpoints import steps_in
from snello.split.security.certs import make_certs
from snello.split.wire import frames
from snello.split.wire.frames import UPLINK_KINDS, Kind

pytestmark = pytest.mark.slow

RECIPE = [
    *("--model", "test_vit", "--weights", "none", "--image-size", "48", "--precision", "fp32", "--device", "cpu"),
    *("--batch-size", "4", "--epochs", "2", "--checkpoint-steps", "3", "--split.cut", "2", "--attention", "explicit"),
]
JOIN = [
    *("--workers", "0", "--no-check-pictures", "--attention", "explicit", "--device", "cpu"),
    *("--reconnect-seconds", "60"),
]
LAST = 14
"""Steps: 7 in each of two epochs; checkpoints are of 0, 3, 6, 7, 9, 12 and 14."""
FROZEN = [
    *("--split.codec", "pca(2)", "--split.client", "frozen", "--split.send-epochs", "1", "--split.replay", "1"),
    *("--epochs", "10"),
]
"""The client sends one epoch, and the server takes 70 steps in all."""
SENT, TAKEN = 7, 70
UP = (*UPLINK_KINDS, Kind.HELLO, Kind.SAVE, Kind.WAIT, Kind.FINISH)
SIDES = ("client", "server")
COUNTED = (
    "uplink_bytes", "downlink_bytes", "eval_bytes", "uncompressed_bytes", "uplink_bytes_by_kind",
    "downlink_bytes_by_kind", "accuracy", "last_accuracy", "best_epoch", "steps", "epochs",
)  # fmt: skip
NOISE = ("Traceback", "Task was destroyed", "never retrieved", "unexpected error")
TOLD = ("snello: ", "connection lost: ", "the server went on ", "resuming after ")


@dataclass
class Scene:
    """A server, a proxy before it, a client, and what happens to them."""

    folder: Path
    pictures: Path
    stack: ExitStack
    recipe: list[str] = field(default_factory=list)
    security: list[str] = field(default_factory=lambda: ["--insecure-loopback"])
    options: list[str] = field(default_factory=list)
    """Of the client."""
    children: list[Child] = field(default_factory=list)
    done_again: int = 0
    port: int = 0
    happened: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.out = self.folder / "client"
        self.server_out = self.folder / "server"
        self.port = free_port()

    @property
    def last(self) -> int:
        """The number of the last checkpoint."""
        return SENT + 1 if self.recipe == FROZEN else LAST

    def start(self, *rules: Rule, seconds: float = 0.0, **wrong: Wrong) -> "Scene":
        """Server, proxy and client; `wrong` says what is wrong with either."""
        self.serve(wrong=wrong.get("server"))
        self.proxy = self.stack.enter_context(Proxy(("127.0.0.1", self.port), rules=rules, seconds=seconds))
        self.server.wait_for("listening on")
        self.join(wrong=wrong.get("client"))
        return self

    def serve(self, *more: str, wrong: Wrong | None = None, resume: bool = False) -> Child:
        args = ["serve", *RECIPE, *self.recipe, *self.security, "--listen", f"127.0.0.1:{self.port}"]
        args += ["--out", str(self.server_out), *more, *(["--resume"] if resume else [])]
        self.server = self._child(args, wrong)
        return self.server

    def join(self, *more: str, wrong: Wrong | None = None, resume: bool = False, address: str = "") -> Child:
        args = ["join", address or self.proxy.address, "--data", str(self.pictures), "--out", str(self.out)]
        self.client = self._child([*args, *JOIN, *self.options, *more, *(["--resume"] if resume else [])], wrong)
        return self.client

    def snello(self, line: str) -> Child:
        """A client from a command line that goes on with a run."""
        verb, *args = shlex.split(line)
        assert verb == "snello"
        before = self._steps
        self.client = self._child(args, None)
        return self._count(self.client, before)

    @property
    def _steps(self) -> int:
        return max((row["step"] for row in rows_of(self.out, "step")), default=0) if self.out.exists() else 0

    def _count(self, client: Child, before: int) -> Child:
        """Counts the steps that a client does again, of those before."""
        found = None if client.wait() else re.search(r"resuming after step (\d+)", client.said)
        self.done_again += before - int(found[1]) if found else 0
        return client

    def _child(self, args: list[str], wrong: Wrong | None) -> Child:
        child = Child(args, self.folder / f"{len(self.children)}-{args[0]}.log", wrong)
        self.children.append(child)
        return child

    def side(self, name: str) -> Child:
        return self.client if name == "client" else self.server

    def rule(self, act: Callable[[], None], kind: Kind, step: int | None, when: str = "before", nth: int = 1) -> Rule:
        """Does something when the n-th frame of a kind and step passes; `wait` returns then."""
        seen: list[None] = []

        def act_once() -> None:
            seen.append(None)
            if len(seen) == nth:
                act()
                self.happened = True

        direction = "up" if kind in UP else "down"
        return Rule(direction, kind, step, action=act_once, when=when, times=nth)  # type: ignore[arg-type]

    def killing(self, who: str, kind: Kind, step: int | None, when: str, nth: int = 1) -> Rule:
        """Kills a side around a message; one that it was killed before does not arrive."""

        def act() -> None:
            self.side(who).kill()
            if when == "before":
                self.proxy.cut()

        return self.rule(act, kind, step, when, nth)

    def wait(self) -> None:
        """Until the rule has done what it does."""
        until(lambda: self.happened, f"the fault of {self.children}")

    def rejoin(self, **options: Any) -> Child:
        """Starts the client again, as it was started, with --resume where it had come so far."""
        before = self._steps
        return self._count(self.join(resume=(self.out / "config.yaml").exists(), **options), before)

    def end(self) -> None:
        """Client and server end well."""
        assert self.client.wait() == 0, self.client
        if self.server.alive:
            self.server.wait_for("listening on")
            self.server.send(signal.SIGTERM)
        assert self.server.wait() == 0, self.server
        for child in self.children:
            assert not any(noise in child.said for noise in NOISE), child

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text())

    @property
    def told(self) -> str:
        """What the user of the client saw of it, without what differs from run to run."""
        lines = [line for child in self.children if child.args[0] == "join" for line in child.said.splitlines()]
        told = dict.fromkeys(line for line in lines if line.startswith(TOLD))
        text = " / ".join(told).replace(str(self.folder), "RUN")
        return re.sub(r"127\.0\.0\.1:\d+", "SERVER", text)

    def close(self) -> None:
        for child in self.children:
            child.kill()


@dataclass(frozen=True)
class Result:
    """All that a run leaves behind and must not depend on what happened on the way."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, scene: Scene) -> "Result":
        session = session_of(scene)
        values: dict[str, Any] = {"rolled_back": None}
        tensors: dict[str, torch.Tensor] = {}
        for side, run in (("client", scene.out), ("server", session)):
            summary = json.loads((run / "summary.json").read_text())
            rows = [{k: v for k, v in row.items() if k != "wait_seconds"} for row in rows_of(run)]
            values |= {f"{side} rows": rows, f"{side} counts": {k: summary[k] for k in COUNTED if k in summary}}
            assert steps_in(run / "checkpoints")[-1] == scene.last
            for file in (run / "model.safetensors", run / "checkpoints" / f"step-{scene.last:09}.safetensors"):
                loaded, values[f"{side} {file.name}"] = load_tensors(file)
                tensors |= {f"{side} {file.name} {name}": value for name, value in loaded.items()}
        if (store := session / "store.frames").exists():
            values["store"] = hashlib.sha256(store.read_bytes()).hexdigest()
        ours, theirs = values["client counts"], values["server counts"]
        assert all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys() - {"accuracy"})
        return cls(values, tensors)

    def require(self, other: "Result") -> None:
        for name, value in self.values.items():
            assert value == other.values[name], name
        assert self.tensors.keys() == other.tensors.keys()
        different = [name for name, value in self.tensors.items() if not torch.equal(value, other.tensors[name])]
        assert not different


def session_of(scene: Scene) -> Path:
    values = yaml.safe_load((scene.out / "config.yaml").read_text())
    (session,) = (scene.server_out / "sessions").glob(f"*-{values['resolved']['server']['session'][:12]}")
    return session


@pytest.fixture(scope="session")
def references(pictures, tmp_path_factory) -> Callable[..., Result]:
    """The results of runs that nothing happens to, by what is said beside RECIPE."""
    made: dict[tuple[str, ...], Result] = {}

    def result(*recipe: str) -> Result:
        if recipe not in made:
            with ExitStack() as stack:
                scene = Scene(tmp_path_factory.mktemp("reference"), pictures, stack, list(recipe))
                stack.callback(scene.close)
                scene.start().end()
                made[recipe] = Result.of(scene)
                assert scene.summary["repeated_bytes"] == scene.summary["rolled_back_steps"] == 0
        return made[recipe]

    return result


@pytest.fixture(scope="session")
def table() -> Iterator[list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    yield rows
    if "FAULT_TABLE" in os.environ:
        head = ("fault", "what happened", "steps lost", "steps done again", "what the user saw")
        lines = [head, ("---",) * len(head), *rows]
        text = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
        Path(os.environ["FAULT_TABLE"]).write_text(text)


@pytest.fixture
def scene(tmp_path, pictures) -> Iterator[Scene]:
    with ExitStack() as stack:
        scene = Scene(tmp_path / "scene", pictures, stack)
        stack.callback(scene.close)
        yield scene


@pytest.fixture
def same(scene, references, table) -> Callable[[str, str], None]:
    """Requires that a run ended as if nothing had happened, and notes the fault."""

    def require(fault: str, happened: str) -> None:
        scene.end()
        Result.of(scene).require(references(*scene.recipe))
        again = scene.done_again + scene.summary["rolled_back_steps"]
        table.append((fault, happened, "0", str(again), scene.told or "nothing"))

    return require


@pytest.fixture
def refused(scene, table) -> Callable[..., None]:
    """Requires that a client was turned away in one line that says why, and notes the fault."""

    def require(fault: str, *words: str, code: int = 2) -> None:
        assert scene.client.wait() == code, scene.client
        line = only_error(scene.client)
        assert all(word in line for word in words), line
        table.append((fault, f"the client ends with exit code {code}", "0", "0", scene.told))

    return require


def only_error(child: Child) -> str:
    """The one line that a process ended with."""
    assert not any(noise in child.said for noise in NOISE), child
    (line,) = (line for line in child.said.splitlines() if line.startswith("snello: "))
    return line


def fingerprints(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------- SIGKILL

MOMENTS = [
    ("server", Kind.ACTIVATIONS, 10, "before"),
    ("server", Kind.ACTIVATIONS, 10, "after"),
    ("server", Kind.GRADIENTS, 10, "before"),
    ("server", Kind.GRADIENTS, 10, "after"),
    ("client", Kind.FEATURES, 10, "before"),
    ("client", Kind.FEATURE_GRADIENTS, 10, "before"),
    ("client", Kind.GRADIENTS, 10, "before"),
    ("server", Kind.SAVE, 9, "before"),
    ("server", Kind.SAVED, 9, "before"),
    ("server", Kind.EVALUATION, 7, "before"),
    ("server", Kind.EVALUATED, 7, "before"),
    ("server", Kind.SAVE, 7, "before"),
    ("server", Kind.FINISH, LAST, "before"),
    ("server", Kind.FINISHED, LAST, "before"),
    ("server", Kind.FINISHED, LAST, "after"),
]
"""Who has the labels, and a message. Killed before it, the other side does not get it, so that this is all that a kill
can leave: `after` differs from `before` the next only in what is under way."""


ALIKE = {
    "client": [
        *((Kind.SAVE, "before"), (Kind.EVALUATION, "before"), (Kind.FINISH, "before")),
        *((Kind.ACTIVATIONS, "after"), (Kind.FINISHED, "after")),
    ],
    "server": [(Kind.ACTIVATIONS, "after"), (Kind.EVALUATION, "before")],
}
"""What leaves the same behind as another moment does, and is left out for time."""


def kills() -> Iterator[Any]:
    for who in SIDES:
        for labels, kind, step, when in MOMENTS:
            if (kind, when) in ALIKE[who]:
                continue
            name = f"{who}-{kind.name}-{step}-{when}" + ("-u" if labels == "client" else "")
            yield pytest.param(who, labels, kind, step, when, id=name)


@pytest.mark.parametrize("who, labels, kind, step, when", list(kills()))
def test_killed_around_a_message(scene, same, who, labels, kind, step, when):
    scene.recipe = ["--split.labels", labels] if labels == "client" else []
    scene.start(scene.killing(who, kind, step, when))
    scene.wait()
    if who == "client":
        scene.rejoin()
    else:
        scene.serve(resume=True)
    shape = ", labels at the client" if labels == "client" else ""
    same(f"kill -9 of the {who}", f"{when} {kind.name} of step {step}{shape}")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("who", SIDES)
def test_killed_around_the_welcome(scene, same, who, when):
    """The second welcome: the first only describes the server. A client that has not begun is simply started again."""
    scene.start(scene.killing(who, Kind.WELCOME, None, when, nth=2))
    scene.wait()
    if who == "server":
        scene.serve(resume=True).wait_for("listening on")
        if scene.client.wait() == 2:
            only_error(scene.client)
            assert not scene.out.exists()
            scene.rejoin()
    else:
        scene.rejoin()
    same(f"kill -9 of the {who}", f"{when} the WELCOME of its first connection")


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param("server"),
        pytest.param("client"),
    ],
)
def test_a_server_with_shared_sessions_is_killed(scene, table, labels):
    """The half goes back to its checkpoint; its clients go on where they are, to the end."""
    scene.recipe = ["--sessions", "shared", "--split.labels", labels]
    scene.start(scene.killing("server", Kind.GRADIENTS, 10, "before"))
    scene.wait()
    scene.serve(resume=True)
    scene.end()
    fault = f"before GRADIENTS of step 10, shared sessions, labels at the {labels}"
    table.append(("kill -9 of the server", fault, str(scene.summary["lost_steps"]), "0", scene.told))


# ----------------------------------------------------------------------------------------------- freeze and replay

REPLAYING = [
    (Kind.ACTIVATIONS, 4, 1),
    (Kind.GRADIENTS, 4, 1),
    (Kind.SAVED, 6, 1),
    (Kind.SAVED, SENT, 1),
    (Kind.WAITED, SENT, 2),
    (Kind.EVALUATED, SENT, 1),
    (Kind.SAVED, SENT, 2),
    (Kind.FINISHED, SENT, 1),
]
"""Messages, with their steps and which of those it is: while the client sends, while the server goes on by itself, and
when it is asked for the result. The side that is not killed does not get the message."""


@pytest.mark.parametrize("kind, step, nth", [pytest.param(*m, id=f"{m[0].name}-{m[1]}-{m[2]}") for m in REPLAYING])
@pytest.mark.parametrize("who", SIDES)
def test_killed_while_a_server_replays(scene, same, who, kind, step, nth):
    scene.recipe = FROZEN
    scene.start(scene.killing(who, kind, step, "before", nth))
    scene.wait()
    if who == "client":
        scene.rejoin()
    else:
        scene.serve(resume=True)
    same(f"kill -9 of the {who}", f"before {kind.name} {nth} of step {step}, client frozen")


def replayed(scene: Scene) -> int:
    """The steps that the server has taken by itself, as its rows say."""
    return len(rows_of(session_of(scene), "replay"))


def test_killed_again_and_again_while_a_server_replays(scene, same):
    scene.recipe = FROZEN
    scene.start(scene.killing("server", Kind.WAITED, SENT, "before", 2))
    scene.wait()
    for who in ("client", "server", "client"):
        scene.side(who).kill()
        scene.serve(resume=True).wait_for("listening on") if not scene.server.alive else None
        before = replayed(scene)
        if not scene.client.alive:  # one that has lost its server goes on by itself, and keeps its folder
            scene.join(resume=True)
        until(lambda before=before: replayed(scene) != before or not scene.client.alive, "a step of the server")
    same("kill -9 of both in turn", "while the server takes the steps it has left")


@pytest.mark.parametrize("server_stops", [False, True])
def test_a_client_leaves_when_all_is_sent(scene, same, server_stops):
    """And the server goes on by itself, or does when it has been stopped and its client is back."""
    scene.recipe = FROZEN
    scene.start(scene.rule(lambda: scene.client.send(signal.SIGINT), Kind.WAITED, SENT, nth=2))
    assert scene.client.wait() == 130, scene.client
    line = resume_line(scene.client)
    if server_stops:
        stop(scene)
        before = replayed(scene)
        assert before < TAKEN - SENT
        scene.serve(resume=True).wait_for("listening on")
        assert replayed(scene) == before, "nothing is lost"
    else:
        until(lambda: replayed(scene) == TAKEN - SENT, "all steps of the server")
    scene.snello(line)
    same("Ctrl-C to the client", f"when all is sent; the server {'is stopped too' if server_stops else 'goes on'}")
    assert scene.summary["rolled_back_steps"] == 0


def test_sigterm_to_a_server_that_replays(scene, same):
    scene.recipe = FROZEN
    scene.start(scene.rule(lambda: stop(scene), Kind.WAIT, SENT, nth=2))
    scene.wait()
    scene.serve(resume=True)
    same("SIGTERM to the server", "while it takes the steps it has left")
    assert scene.summary["rolled_back_steps"] == 0


@pytest.mark.parametrize("what", ["deleted", "damaged"])
def test_a_store_is_harmed_while_the_server_is_down(scene, same, what):
    scene.recipe = FROZEN
    scene.start(scene.killing("server", Kind.WAITED, SENT, "before", 2))
    scene.wait()
    store = session_of(scene) / "store.frames"
    data = store.read_bytes()
    store.unlink() if what == "deleted" else store.write_bytes(data[:1000] + bytes(len(data) - 1000))
    scene.serve(resume=True)
    assert scene.client.wait() == 2, scene.client
    line = only_error(scene.client)
    assert "store.frames is gone or damaged" in line and "(store); put the session's file back" in line
    store.write_bytes(data)
    scene.rejoin()
    same(f"store {what}", "while the server is down; then with its file again")


def test_a_client_comes_back_with_other_pictures(scene, same, tmp_path):
    """Of the same number: what is stored would not be theirs."""
    scene.recipe, mine, others = FROZEN, tmp_path / "mine", tmp_path / "others"
    shutil.copytree(scene.pictures, mine)
    write_pictures(others / "train", {"blue": 9, "green": 9, "red": 8}, seed=7)
    write_pictures(others / "val", {"blue": 3, "green": 3, "red": 3}, seed=8)
    scene.pictures = tmp_path / "pictures"
    mine.rename(scene.pictures)
    scene.start(scene.killing("client", Kind.ACTIVATIONS, 4, "before"))
    scene.wait()
    scene.pictures.rename(mine)
    others.rename(scene.pictures)
    before = fingerprints(scene.out / "checkpoints")
    scene.join(resume=True)
    assert scene.client.wait() == 2, scene.client
    assert "the pictures are not those the run was started with" in only_error(scene.client)
    assert fingerprints(scene.out / "checkpoints") == before
    scene.pictures.rename(others)
    mine.rename(scene.pictures)
    scene.rejoin()
    same("other pictures", "a client comes back with as many others; then with its own")


# ------------------------------------------------------------------------------- certificates, tokens, versions, TLS


@pytest.fixture(scope="session")
def certs(tmp_path_factory) -> Path:
    """Of a server on this machine and one client."""
    folder = tmp_path_factory.mktemp("certs") / "certs"
    make_certs(CertsConfig(folder))
    return folder


@pytest.fixture
def secured(scene, certs) -> Scene:
    """A scene with TLS and a copy of the certificates, to be spoilt."""
    shutil.copytree(certs, scene.folder / "certs")
    return with_tls(scene)


def with_tls(scene: Scene) -> Scene:
    scene.security = ["--certs", str(scene.folder / "certs")]
    scene.options = ["--certs", str(scene.folder / "certs" / "clients" / "client")]
    return scene


def dated(scene: Scene, days: float, **options: Any) -> Scene:
    """A scene with TLS and certificates for a day that were made so many days from now."""
    make_certs(CertsConfig(scene.folder / "certs", days=1, **options), datetime.now(timezone.utc) + timedelta(days))
    return with_tls(scene)


def nothing_written(scene: Scene) -> None:
    """A client that was not admitted leaves no trace on either side."""
    assert not scene.out.exists() and not (scene.server_out / "sessions").exists()
    assert scene.server.alive, scene.server
    assert "Traceback" not in scene.server.said, scene.server


def test_a_server_does_not_start_with_an_expired_certificate(scene, table):
    dated(scene, -3.0).serve()
    assert scene.server.wait() == 2
    line = only_error(scene.server)
    assert "server.crt expired" in line
    assert not scene.server_out.exists()
    table.append(("certificate of the server expired", "the server starts", "0", "0", "(server) " + line))


def test_the_certificate_of_the_client_expired(scene, certs, refused):
    dated(scene, -3.0).start(server=Wrong(clock_days=-2.5))
    refused("certificate of the client expired", "client.crt expired")
    nothing_written(scene)


def test_the_certificate_of_the_server_expired_while_it_ran(scene, refused):
    dated(scene, -3.0)
    make_certs(CertsConfig(scene.folder / "certs", clients=("new",)))
    scene.options = ["--certs", str(scene.folder / "certs" / "clients" / "new")]
    scene.start(server=Wrong(clock_days=-2.5))
    refused("certificate of the server expired", "the server's certificate expired on")
    nothing_written(scene)


def test_the_clock_of_the_client_is_wrong(secured, refused):
    secured.start(client=Wrong(clock_days=-2.0))
    refused("clock of the client two days slow", "client.crt is not valid before", "clock", "is it right?")
    nothing_written(secured)


def test_the_clock_of_the_server_was_wrong_when_its_certificate_was_made(scene, certs, refused):
    shutil.copytree(certs, scene.folder / "certs")
    dated(scene, 5.0, host=("elsewhere.example",), clients=())
    scene.start(server=Wrong(clock_days=5.5))
    refused("clock of the server five days fast", "certificate is not valid before", "clock")
    nothing_written(scene)


def test_the_certificate_is_for_another_host(secured, refused):
    """Every address that begins with 127 is this machine; the certificate has only the first."""
    secured.serve("--listen", f"127.0.0.2:{secured.port}").wait_for("listening on")
    secured.join(address=f"127.0.0.2:{secured.port}")
    refused("wrong name", "is for localhost", "not for 127.0.0.2")
    nothing_written(secured)


def test_the_certificate_is_of_another_ca(secured, refused):
    make_certs(CertsConfig(secured.folder / "other"))
    secured.options = ["--certs", str(secured.folder / "other" / "clients" / "client")]
    secured.start()
    refused("CA of another server", "not by our CA")
    nothing_written(secured)


def test_the_client_s_certificate_is_of_another_ca(secured, refused):
    make_certs(CertsConfig(secured.folder / "other"))
    for name in ("client.crt", "client.key"):
        shutil.copy(secured.folder / "other/clients/client" / name, secured.folder / "certs/clients/client" / name)
    secured.start()
    refused("certificate of another CA at the client", "the server refuses the certificate of client 'client'", "CA")
    nothing_written(secured)


def test_the_client_has_no_certificate(secured, refused):
    (secured.folder / "certs/clients/client/client.crt").unlink()
    secured.start()
    refused("no certificate where mutual TLS is required", "client.crt")
    nothing_written(secured)


def test_the_token_is_wrong(secured, refused):
    (secured.folder / "certs/clients/client/token").write_text("guessed\n")
    secured.start()
    refused("wrong token", "token", "credentials")
    nothing_written(secured)


def test_plaintext_to_a_server_with_tls(secured, refused):
    secured.options = []
    secured.start()
    refused("plaintext to a server with TLS", "the server speaks TLS", "--certs")
    nothing_written(secured)


def test_tls_to_a_server_without(secured, refused):
    secured.security = ["--insecure-loopback"]
    secured.start()
    refused("TLS to a server in plaintext", "the server speaks plaintext", "--certs")
    nothing_written(secured)


def test_another_version(scene, refused):
    scene.start(client=Wrong(version=frames.VERSION + 1))
    other, ours = f"version {frames.VERSION + 1}", f"version {frames.VERSION}"
    refused("client of another version", other, ours, "install the same version")
    nothing_written(scene)


def test_both_sides_are_killed_under_tls_while_a_server_replays(secured, same):
    secured.recipe = FROZEN
    secured.start(seconds=0.02)
    until(lambda: secured.out.exists() and len(rows_of(secured.out, "step")) >= 4, "four steps")
    secured.server.kill()
    secured.serve(resume=True).wait_for("listening on")
    until(lambda: len(rows_of(secured.out, "step")) >= SENT - 1, "nearly all steps")
    secured.client.kill()
    secured.join(resume=True)
    until(lambda: replayed(secured) > SENT or not secured.client.alive, "a step of the server after the last frame")
    secured.server.kill()
    secured.serve(resume=True)
    same("kill -9 of both under TLS", "while a client sends and while the server goes on by itself")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_bit_flips_under_tls(secured, same, direction):
    secured.start(seconds=0.02)
    until(lambda: secured.out.exists() and len(rows_of(secured.out, "step")) >= 4, "four steps")
    secured.proxy.flip_next(direction)
    same("bit flipped under TLS", f"in what goes {direction}: the connection breaks, the client connects again")
    assert secured.summary["rolled_back_steps"] == 0 and secured.proxy.connections > 2


# -------------------------------------------------------------------------------------------------- being stopped


def stop(scene: Scene) -> None:
    """SIGTERM to the server, to its end."""
    scene.server.send(signal.SIGTERM)
    assert scene.server.wait(20.0) == 0, scene.server


@pytest.mark.parametrize(
    "method",
    ["full", pytest.param("alast")],
)
def test_sigterm_to_the_server_between_steps(scene, same, method):
    scene.recipe = ["--method", "alast", "--alast.alpha", "5"] if method == "alast" else []
    scene.start(scene.rule(lambda: stop(scene), Kind.ACTIVATIONS, 10))
    scene.wait()
    assert "the server shuts down; step 10 is saved" in scene.server.said
    scene.serve(resume=True)
    same("SIGTERM to the server", f"before ACTIVATIONS of step 10, method {method}")
    assert scene.summary["rolled_back_steps"] == 0
    assert "the server shuts down" in scene.client.said


def test_sigterm_to_the_server_within_a_step(scene, same):
    """It ends the step before it goes."""
    scene.recipe = ["--split.labels", "client"]
    scene.start(scene.rule(lambda: scene.server.send(signal.SIGTERM), Kind.FEATURES, 10))
    scene.wait()
    assert scene.server.wait(20.0) == 0
    scene.serve(resume=True)
    same("SIGTERM to the server", "within step 10, before FEATURES, labels at the client")
    reason_lost = "Internal error from Core" in scene.client.said  # gRPC: a write met the end of the stream
    assert reason_lost or scene.summary["rolled_back_steps"] == 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Kind.SAVE, id="SAVE"),
        pytest.param(Kind.EVALUATION, id="EVALUATION"),
    ],
)
def test_sigterm_to_the_server_at_the_end_of_an_epoch(scene, same, kind):
    """What it was about to be told of the epoch it is told again."""
    scene.start(scene.rule(lambda: stop(scene), kind, 7))
    scene.wait()
    scene.serve(resume=True)
    same("SIGTERM to the server", f"before {kind.name} of step 7")


def test_sigterm_to_the_server_at_the_end(scene, same):
    scene.start(scene.rule(lambda: stop(scene), Kind.FINISH, LAST))
    scene.wait()
    scene.serve(resume=True)
    same("SIGTERM to the server", "before FINISH")


def resume_line(client: Child) -> str:
    line = only_error(client)
    assert re.search("; (resume|fetch the result) with: snello join ", line)
    return line.partition(" with: ")[2]


@pytest.mark.parametrize("how", ["plain", "TLS", pytest.param("a folder's client")])
def test_ctrl_c_to_the_client(scene, certs, same, how):
    if how == "TLS":
        scene.security = ["--certs", str(certs)]
        scene.options = ["--certs", str(certs), "--name", "client"]
        scene.start(seconds=0.01)
        until(lambda: scene.out.exists() and len(rows_of(scene.out, "step")) >= 4, "four steps")
        scene.client.send(signal.SIGINT)
    else:
        scene.out = scene.folder / how
        scene.start(scene.rule(lambda: scene.client.send(signal.SIGINT), Kind.GRADIENTS, 10))
    assert scene.client.wait(20.0) == 130, scene.client
    scene.snello(resume_line(scene.client))
    same(f"Ctrl-C to the client ({how})", "in a step; then the line that it printed")


def test_ctrl_c_to_the_client_while_the_server_is_gone(scene, same):
    scene.start(scene.killing("server", Kind.ACTIVATIONS, 10, "before"))
    scene.client.wait_for("connection lost: ")
    scene.client.send(signal.SIGINT)
    assert scene.client.wait(20.0) == 130, scene.client
    line = resume_line(scene.client)
    scene.serve(resume=True).wait_for("listening on")
    scene.snello(line)
    same("Ctrl-C to the client", "while the server is gone; then the line that it printed")


def test_ctrl_c_to_the_client_while_the_server_restarts(scene, same):
    """The client notices only when it wants to save."""

    def restart() -> None:
        scene.proxy.hold(True)
        scene.server.kill()
        scene.serve(resume=True).wait_for("listening on")
        scene.proxy.cut()
        scene.proxy.hold(False)

    scene.start(
        scene.rule(lambda: scene.client.send(signal.SIGINT), Kind.GRADIENTS, 10),
        scene.rule(restart, Kind.SAVE, 11),
    )
    assert scene.client.wait() == 130, scene.client
    scene.snello(resume_line(scene.client))
    same("Ctrl-C to the client", "while the server restarts; then the line that it printed")


# ------------------------------------------------------------------------------------------------- broken networks


def noted(scene: Scene, sent_again: bool = True) -> None:
    """Nothing was done again but what had to be sent again."""
    assert scene.summary["rolled_back_steps"] == scene.summary["lost_steps"] == 0
    assert not sent_again or scene.summary["repeated_bytes"] > 0


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(k, id=k.name) for k in (Kind.ACTIVATIONS, Kind.GRADIENTS, Kind.EVALUATION, Kind.SAVED)),
        pytest.param(Kind.FINISHED, id="FINISHED"),
    ],
)
def test_cut_within_a_frame(scene, same, kind):
    step = {Kind.EVALUATION: 7, Kind.SAVED: 7, Kind.FINISHED: LAST}.get(kind, 10)
    scene.start(scene.rule(lambda: scene.proxy.cut(), kind, step, "middle"))
    same("connection cut", f"in the middle of {kind.name} of step {step}")
    noted(scene, sent_again=kind != Kind.FINISHED)  # which a session that has ended is asked anew
    assert scene.proxy.connections > 2


@pytest.mark.parametrize("kind, when", [(Kind.ACTIVATIONS, "middle"), (Kind.GRADIENTS, "before")], ids=["up", "down"])
def test_a_silent_network(scene, same, kind, when):
    """Longer than the client's patience: what was on the way arrives when the client has tried again already."""
    scene.options = ["--patience-seconds", "2"]
    scene.start(scene.rule(lambda: scene.proxy.hold(True), kind, 10, when))
    scene.client.wait_for("connection lost: no answer in ")
    scene.proxy.hold(False)
    same("silent network", f"from {when} {kind.name} of step 10 until the client tried again")
    noted(scene)


PLACES = {"magic": 0, "kind": 5, "flags": 7, "step": 8, "size": 20, "table": 28}
"""Bytes of a header, and of the table after it."""


@pytest.mark.parametrize("place", [None, b"labels.share"], ids=["header", "name"])
def test_bits_flip_in_what_goes_up_in_plaintext(scene, same, place):
    """The server refuses the frame and stays as it was."""
    places = PLACES if place is None else {"name of an array": place}
    flips = [Wrong(flips=((Kind.ACTIVATIONS, 10, byte),)) for byte in places.values()]
    scene.start(client=flips[0])
    for wrong in [*flips[1:], None]:
        assert scene.client.wait() == 2, scene.client
        only_error(scene.client)
        scene.join(resume=True, wrong=wrong)
    same("bits flipped in plaintext", f"in ACTIVATIONS: {', '.join(places)}, one after the other")
    assert "unexpected error" not in scene.server.said


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(None, id="header"),
        pytest.param(b"gradients.loss", id="name"),
    ],
)
def test_bits_flip_in_what_comes_down_in_plaintext(scene, same, place):
    places = PLACES if place is None else {"name of an array": place}
    flips = [(int(Kind.GRADIENTS), step, byte) for step, byte in enumerate(places.values(), 4)]
    scene.start(server=Wrong(flips=tuple(flips)))
    for _ in flips:
        assert scene.client.wait() == 2, scene.client
        only_error(scene.client)
        scene.join(resume=True)
    same("bits flipped in plaintext", f"in GRADIENTS: {', '.join(places)}, one after the other")


# --------------------------------------------------------------------------------------------- folders and disks


def test_the_server_comes_back_with_an_empty_folder(scene, same):
    scene.start(scene.killing("server", Kind.ACTIVATIONS, 10, "before"))
    scene.wait()
    before = fingerprints(scene.out / "checkpoints")
    kept = scene.server_out
    scene.server_out = scene.folder / "empty"
    scene.serve()
    assert scene.client.wait() == 2
    assert "unknown-session" in only_error(scene.client) and "--out folder back" in only_error(scene.client)
    assert fingerprints(scene.out / "checkpoints") == before
    stop(scene)
    scene.server_out = kept
    scene.serve(resume=True).wait_for("listening on")
    scene.rejoin()
    same("server with an empty folder", "after step 10; then with its folder again")


@pytest.mark.parametrize("who", SIDES)
def test_the_newest_checkpoint_is_cut_off(scene, same, who):
    """One line names it, and the run goes on from the one before."""
    scene.start(scene.killing("server", Kind.ACTIVATIONS, 10, "before"))
    scene.wait()
    scene.client.kill()
    folder = (scene.out if who == "client" else session_of(scene)) / "checkpoints"
    newest = folder / f"step-{steps_in(folder)[-1]:09}.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    (folder / ".step-000000012.safetensors.tmp").write_bytes(b"left over")
    scene.serve(resume=True).wait_for("listening on")
    scene.rejoin()
    same("checkpoint cut off", f"the {who}'s newest")
    assert f"{newest.name} is damaged and left out" in scene.side(who).said


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
@pytest.mark.parametrize("who", SIDES)
def test_the_disk_is_full(scene, same, who, what):
    """With room for the metrics but for no checkpoint, or for half a line of metrics; what was there stays."""

    def fill() -> None:
        run = scene.out if who == "client" else session_of(scene)
        scene.side(who).limit_files(20_000 if what == "checkpoint" else (run / "metrics.jsonl").stat().st_size + 20)

    scene.start(scene.rule(fill, Kind.ACTIVATIONS, 8))
    assert scene.client.wait() == 2, scene.client
    line = only_error(scene.client)
    assert str(scene.folder / who) in line and ("free" in line or (who, what) == ("client", "metrics"))
    checkpoints = {run: steps_in(run / "checkpoints") for run in (scene.out, session_of(scene))}
    assert all(set(steps) & {6, 7} for steps in checkpoints.values())
    scene.side("server").limit_files(None)
    scene.rejoin()
    same("disk full", f"at the {who} from step 8 on, no room for the next {what}; then with room again")


# ------------------------------------------------------------------------------------------------------- the rest


def test_two_clients_with_the_same_folder(scene, same, table):
    scene.start(scene.rule(lambda: until(lambda: not first.alive, "the first client"), Kind.ACTIVATIONS, 10))
    first = scene.client
    until(lambda: scene.out.exists() and len(rows_of(scene.out, "step")) >= 10, "ten steps")
    scene.join(resume=True)
    assert first.wait() == 2
    assert "taken-over" in only_error(first) and "same --out" in only_error(first)
    scene.wait()
    same("two clients with the same --out", "the second takes over, the first ends")


def test_the_network_carries_little_more_than_what_is_counted(scene, tmp_path, table, certs):
    """With TLS, frames of 250 to 400 kB and 14 kB of control frames beside them."""
    scene.pictures = tmp_path / "large"
    write_pictures(scene.pictures / "train", {"blue": 22, "red": 22})
    write_pictures(scene.pictures / "val", {"blue": 8, "red": 8}, seed=1)
    scene.recipe = ["--image-size", "160", "--batch-size", "16", "--split.codec", "none", "--split.eval-codec", "none"]
    scene.security, scene.options = ["--certs", str(certs)], ["--certs", str(certs)]
    file = tmp_path / "counted"
    scene.start(client=Wrong(count=file))
    scene.end()
    summary, everything = scene.summary, json.loads(file.read_text())
    counted = {way: sum(summary[f"{way}_bytes_by_kind"].values()) for way in ("uplink", "downlink")}
    assert everything["out"] >= counted["uplink"] > 5 * 250_000
    up, down = scene.proxy.bytes_up / everything["out"], scene.proxy.bytes_down / everything["in"]
    assert 1 < up < 1.03 and 1 < down < 1.03
    seen = f"{up - 1:.2%} more bytes up and {down - 1:.2%} more down than in frames"
    table.append(("none: overhead of TLS, HTTP/2 and gRPC", f"{counted} bytes counted", "0", "0", seen))
