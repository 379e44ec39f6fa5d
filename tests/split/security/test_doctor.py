"""What the doctor finds, with real sockets, TLS servers and gRPC servers, each wrong in one way."""

import errno
import io
import json
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import free_port
from helpers.certificates import LONG_AGO, NOW, grpc_server, made
from rich.console import Console

from snello.config import DoctorConfig
from snello.errors import AuthenticationError
from snello.split.security import doctor
from snello.split.security.doctor import Finding, examine, explain, print_findings, to_rows
from snello.split.wire.frames import VERSION

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
WELL = ["name", "port", "TLS", "server's CA", "server's dates", "server's names", "our certificate", "admission"]


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that gives each connection to `answer`, one after the other; its port."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.settimeout(20)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
    thread.join()


def tls(
    folder: Path,
    reply: bytes = SETTINGS,
    alpn: bool = True,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    unasked: bool = True,
) -> Callable[[socket.socket], None]:
    """What answers with `reply` over mutual TLS; unasked, as gRPC does, or to the first bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
    context.load_verify_locations(folder / "server/ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = newest
    if alpn:
        context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            if not unasked:
                secured.recv(64)
            secured.sendall(reply)
            while secured.recv(64):
                pass

    return answer


def replies(reply: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(64)
        connection.sendall(reply)
        connection.recv(64)

    return answer


def silent(connection: socket.socket) -> None:
    while connection.recv(1024):
        pass


def look(port: int, certs: Path | None, host: str = "127.0.0.1", name: str | None = None) -> list[Finding]:
    return examine(DoctorConfig(f"{host}:{port}", certs, name))


def failed(findings: list[Finding]) -> Finding:
    """The only failure; after it, only what the certificates themselves say is looked at."""
    (failure,) = [finding for finding in findings if not finding.ok]
    rest = findings[findings.index(failure) + 1 :]
    assert {finding.what for finding in rest} <= {"server's names", "our certificate"}
    return failure


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("other"))


@pytest.fixture
def dns(monkeypatch):
    """Every name is this machine."""
    real = socket.getaddrinfo
    monkeypatch.setattr(doctor.socket, "getaddrinfo", lambda host, *more, **kw: real("127.0.0.1", *more, **kw))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_is_well_with_a_grpc_server(certs, host):
    with grpc_server(certs) as port:
        findings = look(port, certs, host)
        assert explain(f"{host}:{port}", certs, None) is None
    assert [finding.what for finding in findings] == WELL and all(finding.ok for finding in findings), findings
    texts = {finding.what: finding.text for finding in findings}
    assert "127.0.0.1" in texts["port"] and "TLSv1.3" in texts["TLS"] and "'alice'" in texts["our certificate"]
    assert "server.example, localhost, 192.0.2.7, 127.0.0.1, ::1" in texts["server's names"]
    assert f"until {NOW + timedelta(days=365):%Y-%m-%d}" in texts["server's dates"]


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_all_is_well_with_both_versions_of_tls(certs, newest):
    with listening(tls(certs, newest=newest)) as port:
        findings = look(port, certs / "clients/alice")
    assert [finding.what for finding in findings] == WELL and all(finding.ok for finding in findings), findings


def test_all_is_well_with_a_server_that_speaks_only_when_asked(certs):
    with listening(tls(certs, unasked=False)) as port:
        assert all(finding.ok for finding in look(port, certs))


def test_a_name_that_does_not_resolve(certs):
    finding = failed(look(7443, certs, "server.invalid"))
    assert finding.what == "name" and "server.invalid cannot be resolved: " in finding.text and finding.advice


@pytest.mark.parametrize("host", ["a..example", "a" * 300])
def test_what_is_no_name_does_not_resolve_either(certs, host):
    assert failed(look(7443, certs, host)).what == "name"


def test_a_closed_port(certs):
    port = free_port()
    finding = failed(look(port, certs))
    assert finding.what == "port" and f"127.0.0.1 port {port} refuses connections" in finding.text
    assert "snello serve" in finding.advice


@pytest.mark.parametrize(
    "error, text, advice",
    [
        (TimeoutError("timed out"), "does not answer within 5 s", "firewall"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "is unreachable", "VPN"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "is unreachable", "VPN"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign"), "cannot be connected to: Cannot assign", "address"),
    ],
)
def test_other_ways_not_to_reach_a_port(monkeypatch, certs, error, text, advice):
    def connect(address: Any) -> None:
        raise error

    monkeypatch.setattr(doctor, "_connect", connect)
    finding = failed(look(7443, certs))
    assert finding.what == "port" and text in finding.text and advice in finding.advice


def test_one_address_that_answers_is_enough_and_all_that_do_not_are_named(monkeypatch, certs):
    def resolve(host: str, port: int) -> list[Any]:
        return [(address, port) for address in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(doctor, "_resolve", resolve)
    with grpc_server(certs) as port:
        findings = look(port, certs)
    assert all(finding.ok for finding in findings) and "127.0.0.1" in findings[1].text
    finding = failed(look(free_port(), certs))
    assert "127.0.0.2 port" in finding.text and "127.0.0.1 port" in finding.text
    assert finding.advice.count("snello serve") == 1


def test_a_server_of_another_ca(certs, other):
    with grpc_server(other) as port:
        finding = failed(look(port, certs))
    assert finding.what == "server's CA" and finding.text.count("snello CA ") == 2 and "together" in finding.advice


def test_a_client_of_another_ca_is_refused(certs, other, tmp_path):
    shutil.copytree(other / "clients/alice", tmp_path / "mixed")
    shutil.copy(certs / "ca.crt", tmp_path / "mixed/ca.crt")
    for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with listening(tls(certs, newest=newest)) as port:
            finding = failed(look(port, tmp_path / "mixed"))
        assert finding.what == "admission" and "refuses the certificate of client 'alice': unknown ca" in finding.text
    with grpc_server(certs) as port:
        finding = failed(look(port, tmp_path / "mixed"))
    assert finding.what == "admission" and "refuses the certificate" in finding.text


def test_a_server_under_another_name(certs, dns):
    with grpc_server(certs) as port:
        assert all(finding.ok for finding in look(port, certs, "server.example"))
        finding = failed(look(port, certs, "other.example"))
    assert finding.what == "server's names"
    assert "is for server.example, localhost, 192.0.2.7, 127.0.0.1, ::1, not for other.example" in finding.text


def test_a_server_whose_certificate_expired(tmp_path):
    made(tmp_path, LONG_AGO, clients=("old",), days=1)
    made(tmp_path, host=(), clients=("alice",))
    with listening(tls(tmp_path)) as port:
        findings = look(port, tmp_path, name="alice")
        both = look(port, tmp_path, name="old")
        line = explain(f"127.0.0.1:{port}", tmp_path, "alice")
    finding = failed(findings)
    assert finding.what == "server's dates" and "--host" in finding.advice and "clock" in finding.advice
    assert f"expired on {LONG_AGO + timedelta(days=1):%Y-%m-%d}" in finding.text
    assert line == f"{finding.text}; {finding.advice}"
    assert [f.what for f in findings if f.ok] == [w for w in WELL[:-1] if w != "server's dates"]
    assert [f.what for f in both if not f.ok] == ["server's dates", "our certificate"]


def test_a_server_whose_certificate_is_not_yet_valid(tmp_path):
    made(tmp_path, clients=("alice",))
    ahead = tmp_path / "ahead"
    shutil.copytree(tmp_path, ahead, ignore=shutil.ignore_patterns("ahead"))
    made(ahead, NOW + timedelta(days=2), clients=())
    with listening(tls(ahead)) as port:
        findings = look(port, tmp_path)
    finding = failed(findings)
    assert finding.what == "server's dates" and "clock" in finding.text
    assert f"is not valid before {NOW + timedelta(days=2, minutes=-5):%Y-%m-%d %H:%M}" in finding.text


def test_our_certificate_expired(tmp_path):
    made(tmp_path, LONG_AGO, days=1)
    made(tmp_path, clients=())
    for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with listening(tls(tmp_path, newest=newest)) as port:
            finding = failed(look(port, tmp_path))
        assert finding.what == "our certificate" and "'alice' expired on" in finding.text
        assert "--clients" in finding.advice


@pytest.mark.parametrize("name, damage", [("client.key", Path.unlink), ("token", Path.unlink), ("ca.crt", Path.unlink)])
def test_our_files_are_damaged(tmp_path, name, damage):
    damage(made(tmp_path) / "clients/alice" / name)
    with listening(silent) as port:
        finding = failed(look(port, tmp_path))
    assert finding.what == "our files" and name in finding.text


def test_plaintext_to_a_plaintext_server(certs):
    with grpc_server(None) as port:
        findings = look(port, None)
        assert explain(f"127.0.0.1:{port}", None, None) is None
    assert [finding.what for finding in findings] == ["name", "port", "encryption"]
    assert all(finding.ok for finding in findings)


def test_plaintext_to_another_machine(dns):
    with grpc_server(None) as port:
        finding = failed(look(port, None, "server.example"))
        assert explain(f"server.example:{port}", None, None) is None  # the user may have insisted on it
    assert finding.what == "encryption" and "everybody on the way" in finding.text and "--certs" in finding.advice


def test_tls_to_a_plaintext_server(certs):
    with grpc_server(None) as port:
        finding = failed(look(port, certs))
    assert finding.what == "TLS" and "server speaks plaintext, and --certs is given" in finding.text


@pytest.mark.parametrize("kind", ["grpc", "tls 1.2", "tls 1.3"])
def test_plaintext_to_a_tls_server(certs, kind):
    newest = ssl.TLSVersion.TLSv1_2 if kind == "tls 1.2" else ssl.TLSVersion.TLSv1_3
    with grpc_server(certs) if kind == "grpc" else listening(tls(certs, newest=newest)) as port:
        finding = failed(look(port, None))
    assert finding.what == "encryption" and "server speaks TLS, and no --certs" in finding.text
    assert "give --certs" in finding.advice


HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize("answer", [silent, replies(HTTP), replies(b""), replies(b"\0\0\0"), lambda connection: None])
@pytest.mark.parametrize("encrypted", [True, False])
def test_something_else_listens_there(certs, hasty, answer, encrypted):
    tired = []  # servers that waited longer than the doctor is to wait

    def watched(connection: socket.socket) -> None:
        try:
            answer(connection)
        except TimeoutError:
            tired.append(connection)

    with listening(watched) as port:
        finding = failed(look(port, certs if encrypted else None))
    assert finding.what == ("TLS" if encrypted else "encryption") and "is it the port" in finding.advice
    assert tired == []


@pytest.mark.parametrize("reply, alpn, what", [(HTTP, True, "admission"), (SETTINGS, False, "TLS")])
def test_something_else_listens_there_with_tls(certs, reply, alpn, what):
    with listening(tls(certs, reply, alpn)) as port:
        finding = failed(look(port, certs))
    assert finding.what == what and "not a gRPC server" in finding.text


def test_a_server_that_says_nothing_after_the_handshake(certs, hasty):
    with listening(tls(certs, b"")) as port:
        finding = failed(look(port, certs))
    assert finding.what == "admission" and "says nothing" in finding.text


TOLD = {"version": version("snello"), "protocol": VERSION, "token": "accepted"}


def probed(certs: Path, told: Callable[[], dict[str, Any]]) -> list[Finding]:
    with grpc_server(certs) as port:
        findings = examine(DoctorConfig(f"127.0.0.1:{port}", certs), told)
    assert [finding.what for finding in findings[: len(WELL)]] == WELL
    return findings[len(WELL) :]


def test_clock_version_and_token_are_well(certs):
    findings = probed(certs, lambda: {"time": time.time() + 30, **TOLD})
    assert [finding.what for finding in findings] == ["clock", "version", "protocol", "token"]
    assert all(finding.ok and not finding.advice for finding in findings)
    assert "30 s ahead" in findings[0].text and version("snello") in findings[1].text


@pytest.mark.parametrize(
    "what, answer, text",
    [
        ("clock", {"time": time.time() + 3600}, "s ahead of ours"),
        ("clock", {"time": time.time() - 3600}, "s behind ours"),
        ("version", {"version": "0.0.9"}, f"0.0.9 on the server, {version('snello')} here"),
        ("protocol", {"protocol": VERSION + 1}, f"{VERSION + 1} on the server, {VERSION} here"),
        ("token", {"token": "unknown token"}, "unknown token"),
    ],
)
def test_clock_version_and_token_differ(certs, what, answer, text):
    findings = probed(certs, lambda: {"time": time.time(), **TOLD, **answer})
    (finding,) = [finding for finding in findings if not finding.ok]
    assert finding.what == what and text in finding.text and finding.advice and len(findings) == 4


def test_the_probe_may_fail(certs):
    def fail() -> dict[str, Any]:
        raise AuthenticationError("client 'alice' is not admitted")

    (finding,) = probed(certs, fail)
    assert finding == Finding("server", False, "client 'alice' is not admitted")


def test_the_probe_is_not_asked_where_the_connection_fails(certs):
    def fail() -> dict[str, Any]:
        raise AssertionError

    assert failed(examine(DoctorConfig(f"127.0.0.1:{free_port()}", certs), fail)).what == "port"


def test_explain_is_one_line(certs):
    line = explain(f"127.0.0.1:{free_port()}", certs, None)
    assert line is not None and "refuses connections; is `snello serve` running" in line and "\n" not in line
    with listening(silent) as port:
        assert "no such client" in (explain(f"127.0.0.1:{port}", certs, "eve") or "")


def test_findings_are_printed_in_one_line_each_without_control_characters():
    findings = [
        Finding("name", True, "well"),
        Finding("token", False, "bad\n\x1b[31mred\u202e [bold]" + "x" * 1000, "do this"),
    ]
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, width=40))
    well, bad = stream.getvalue().splitlines()
    assert well == "  ok  name   well"
    assert bad.startswith("FAIL  token  bad??[31mred? [bold]xxx") and bad.endswith("x...; do this") and len(bad) < 450
    assert json.loads(json.dumps(to_rows(findings)))[0] == {"what": "name", "ok": True, "text": "well", "advice": ""}
    print_findings([], Console(file=stream))


def test_tokens_and_keys_are_in_no_finding(certs):
    token = (certs / "clients/alice/token").read_text().strip()
    with grpc_server(certs) as port:
        shown = str(look(port, certs))
    assert token not in shown and "PRIVATE" not in shown and "alice" in shown
