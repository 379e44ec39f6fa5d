"""Certificates and tokens: what is made, that TLS and gRPC accept it and nothing else, and that nothing leaks."""

import errno
import hashlib
import json
import os
import shutil
import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from conftest import run_python
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from helpers.certificates import HOSTS, LONG_AGO, NOW, grpc_server, made

from snello.config import CertsConfig
from snello.errors import CheckpointError, ConfigError
from snello.split.security import certs as module
from snello.split.security.certs import make_certs
from snello.split.security.tls import ClientFiles, ServerFiles, certificate_hosts, certificate_name

PRIVATE = ("ca.key", "server/server.key", "clients/alice/client.key", "clients/alice/token")
PUBLIC = ("ca.crt", "server/ca.crt", "server/server.crt", "server/tokens.json", "clients/alice/ca.crt")
SIDES = ("clients/alice/client", "server/server")
FILES = {*PRIVATE, *PUBLIC, "clients/alice/client.crt"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, and every folder, hidden ones too."""
    return {str(p.relative_to(folder)): b"" if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def tls_handshake(folder: Path, host: str, client: str = "alice") -> None:
    """Mutual TLS in memory, by the strict rules that Python 3.13 has as its default."""
    server, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    place = folder / "clients" / client
    server.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
    ours.load_cert_chain(place / "client.crt", place / "client.key")
    server.load_verify_locations(folder / "server/ca.crt")
    ours.load_verify_locations(place / "ca.crt")
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (server, ours):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [ours.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not ends


def who(port: int, ca: bytes, key: bytes | None, chain: bytes | None) -> bytes:
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        return channel.unary_unary("/t/Who")(b"", timeout=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("certs") / "new" / "certs", clients=("alice", "bob"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("other"))


def test_what_is_made_and_that_keys_and_tokens_are_private(tmp_path):
    made(tmp_path / "certs")
    assert {name for name, content in contents(tmp_path / "certs").items() if content} == FILES
    modes = {name: (tmp_path / "certs" / name).stat().st_mode & 0o777 for name in FILES}
    assert {name for name, mode in modes.items() if mode == 0o600} == set(PRIVATE)
    assert all(modes[name] & 0o044 for name in PUBLIC)


def test_keys_are_private_from_the_start(tmp_path, monkeypatch):
    modes = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (modes.append(os.fstat(fd).st_mode & 0o777), real(fd)))
    monkeypatch.setattr(module.os, "chmod", None)
    old = os.umask(0)
    try:
        made(tmp_path / "certs")
    finally:
        os.umask(old)
    assert sorted(modes) == [0o600] * len(PRIVATE) + [0o666] * (len(FILES) - len(PRIVATE))


def test_tokens_are_stored_as_hashes_and_shown_nowhere(tmp_path):
    lines = make_certs(CertsConfig(tmp_path, HOSTS, ("alice", "bob")))
    tokens = {name: (tmp_path / "clients" / name / "token").read_text() for name in ("alice", "bob")}
    hashes = json.loads((tmp_path / "server/tokens.json").read_text())
    assert hashes == {name: hashlib.sha256(token.strip().encode()).hexdigest() for name, token in tokens.items()}
    files = ClientFiles.load(tmp_path, "alice")
    server = ServerFiles.load(tmp_path)
    assert files.token == tokens["alice"].strip() and len(files.token) == 43 and tokens["alice"].count("\n") == 1
    assert server.tokens == hashes
    shown = "\n".join([*lines, repr(files), str(files), repr(server)])
    for secret in (files.token, tokens["bob"].strip(), "PRIVATE", files.key.decode().splitlines()[1]):
        assert secret not in shown
    assert "alice" in shown and "bob" in shown


def test_lines_say_where_until_when_and_for_whom(tmp_path):
    lines = make_certs(CertsConfig(tmp_path, HOSTS, ("alice",), days=10), NOW)
    assert [
        str(tmp_path / name) in line for name, line in zip(("ca.crt", "server", "clients/alice"), lines, strict=False)
    ]
    assert "server.example, 192.0.2.7, localhost, 127.0.0.1, ::1" in lines[1]
    assert f"{NOW + timedelta(days=10):%Y-%m-%d}" in lines[1] and "hand out" in lines[3] and "keep secret" in lines[4]
    assert len(lines) == 5


def test_without_a_host_the_server_is_for_this_machine_only_and_that_is_said(tmp_path):
    assert "this machine only" in make_certs(CertsConfig(tmp_path))[-1]
    assert certificate_hosts(certificate(tmp_path / "server/server.crt")) == ["localhost", "127.0.0.1", "::1"]
    assert ClientFiles.load(tmp_path, None).name == "client"


def test_extensions(folder):
    ca, server = certificate(folder / "ca.crt"), certificate(folder / "server/server.crt")
    client = certificate(folder / "clients/alice/client.crt")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and not usage.digital_signature
    for leaf, purpose in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (client, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert leaf.not_valid_before_utc < NOW - timedelta(minutes=4)
        assert isinstance(leaf.public_key().curve, ec.SECP256R1)
    assert not certificate_hosts(client)


@pytest.mark.parametrize("host", ["server.example", "SERVER.example", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_strict_tls_accepts_both_sides(folder, host):
    tls_handshake(folder, host)


def test_strict_tls_refuses_another_name(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        tls_handshake(folder, "other.example")


@pytest.mark.parametrize("taken, given", [SIDES, SIDES[::-1]])
def test_a_client_is_no_server_and_a_server_no_client(folder, tmp_path, taken, given):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for suffix in (".crt", ".key"):
        shutil.copy(folder / (taken + suffix), tmp_path / (given + suffix))
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        tls_handshake(tmp_path, "localhost")


def test_grpc_accepts_the_certificates_and_no_client_of_another_ca(folder, other):
    ours, theirs = ClientFiles.load(folder, "bob"), ClientFiles.load(other, None)
    with grpc_server(folder) as port:
        assert who(port, ours.ca, ours.key, ours.certificate) == b"bob"
        for ca, key, chain in ((ours.ca, theirs.key, theirs.certificate), (ours.ca, None, None)):
            with pytest.raises(grpc.RpcError) as error:
                who(port, ca, key, chain)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError, match="CERTIFICATE_VERIFY_FAILED"):
            who(port, theirs.ca, ours.key, ours.certificate)


def test_clients_are_added_and_the_rest_stays(tmp_path):
    before = contents(made(tmp_path))
    lines = make_certs(CertsConfig(tmp_path, clients=("bob", "eve", "bob")))
    after = contents(tmp_path)
    assert all(after[name] == content for name, content in before.items() if name != "server/tokens.json")
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"bob", "eve"}
    tokens = [json.loads(files["server/tokens.json"]) for files in (before, after)]
    assert tokens[1].keys() == {"alice", "bob", "eve"} and tokens[1]["alice"] == tokens[0]["alice"]
    assert not any("for the server" in line or "ca.crt" in line for line in lines)
    tls_handshake(tmp_path, "server.example", "eve")


@pytest.mark.parametrize("clients", [CertsConfig.clients, ()])
@pytest.mark.parametrize("name", ["client", "alice"])
def test_a_host_renews_the_server_and_neither_changes_nor_adds_clients(tmp_path, clients, name):
    before = contents(made(tmp_path, clients=(name,)))
    make_certs(CertsConfig(tmp_path, ("new.example",), clients))
    after = contents(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"server/server.crt"}
    assert before.keys() == after.keys() and ServerFiles.load(tmp_path)
    tls_handshake(tmp_path, "new.example", name)


def test_a_removed_server_is_made_anew(tmp_path):
    made(tmp_path, clients=())
    for path in (tmp_path / "server").iterdir():
        path.unlink()
    make_certs(CertsConfig(tmp_path, clients=("bob",)))
    assert ServerFiles.load(tmp_path).tokens.keys() == {"bob"}
    tls_handshake(tmp_path, "localhost", "bob")


@pytest.mark.parametrize("gone", ["clients/alice", "its line in tokens.json"])
@pytest.mark.parametrize("settings", [{"clients": ("bob", "alice")}, {"host": ("a.example",), "clients": ("alice",)}])
def test_a_client_that_exists_is_named_and_nothing_changes(tmp_path, settings, gone):
    made(tmp_path)
    if gone == "clients/alice":  # handed out and removed here: it still joins with its token
        for path in (tmp_path / gone).iterdir():
            path.unlink()
        (tmp_path / gone).rmdir()
    else:
        (tmp_path / "server/tokens.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"alice in .* exists already; .*tokens\.json"):
        make_certs(CertsConfig(tmp_path, **settings))
    assert contents(tmp_path) == before


def test_nothing_to_do_is_said(tmp_path):
    made(tmp_path)
    with pytest.raises(ConfigError, match="nothing to do"):
        make_certs(CertsConfig(tmp_path, clients=()))


@pytest.mark.parametrize(
    "host",
    [
        *("", "a b", "a..b", ".a", "a.", "-a.example", "http://a", "a:7443", "1.2.3", "1.2.3.256", "*.a", "ä.example"),
        *("fe80::1%eth0", "a" * 64, "a." * 127 + "a", "a\n", "\u212a.example"),
    ],
)
def test_bad_hosts_are_refused_in_one_line(tmp_path, host):
    with pytest.raises(ConfigError, match=r"^--host must be names or IP addresses, as .*, got .+$") as error:
        make_certs(CertsConfig(tmp_path / "certs", (host,)))
    assert "\n" not in str(error.value) and not (tmp_path / "certs").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_the_address_of_every_interface_is_no_host(tmp_path, host):
    with pytest.raises(ConfigError, match="means every address"):
        make_certs(CertsConfig(tmp_path, (host,)))


def test_hosts_are_written_once_and_in_one_form(tmp_path):
    made(tmp_path, host=("A.example", "a.example", "[2001:DB8:0::1]", "localhost", "my_host"))
    expected = {"a.example", "2001:db8::1", "my_host", "localhost", "127.0.0.1", "::1"}
    hosts = certificate_hosts(certificate(tmp_path / "server/server.crt"))
    assert set(hosts) == expected and len(hosts) == len(expected)


def encrypted(path: Path) -> None:
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:80])


def of_another(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("ca.key", Path.unlink, r"ca\.key is missing: bring it back"),
        ("ca.crt", Path.unlink, r"ca\.crt is missing: bring it back"),
        ("ca.key", as_folder, r"ca\.key: Is a directory"),
        ("ca.key", truncated, r"ca\.key is not a PEM private key"),
        ("ca.key", encrypted, r"ca\.key is encrypted"),
        ("ca.key", of_another, r"ca\.key does not belong to .*ca\.crt"),
        ("ca.crt", truncated, r"ca\.crt is not a PEM certificate"),
        ("server/tokens.json", Path.unlink, r"tokens\.json is missing"),
        ("server/tokens.json", truncated, r"tokens\.json must hold"),
        ("server/server.key", truncated, r"server\.key is not a PEM private key"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line_and_left_as_it_is(tmp_path, name, damage, message):
    damage(made(tmp_path) / name)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        make_certs(CertsConfig(tmp_path, ("a.example",), ("bob",)))
    assert "\n" not in str(error.value) and contents(tmp_path) == before


def test_a_certificate_that_is_no_ca_signs_nothing(tmp_path):
    made(tmp_path)
    for suffix in (".crt", ".key"):
        shutil.copy(tmp_path / (SIDES[0] + suffix), tmp_path / ("ca" + suffix))
    with pytest.raises(ConfigError, match=r"ca\.crt is not the certificate of a CA"):
        make_certs(CertsConfig(tmp_path, clients=("bob",)))


def test_an_expired_ca_signs_nothing(tmp_path):
    made(tmp_path, NOW - timedelta(days=5000))
    with pytest.raises(ConfigError, match=r"ca\.crt expired on .*; make a new CA"):
        make_certs(CertsConfig(tmp_path, clients=("bob",)))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "certs").write_text("mine")
    with pytest.raises(ConfigError, match="certs is a file"):
        make_certs(CertsConfig(tmp_path / "certs"))
    with pytest.raises(CheckpointError, match="could not write"):
        make_certs(CertsConfig(tmp_path / "certs" / "sub"))
    with pytest.raises(CheckpointError, match="could not write"):
        make_certs(CertsConfig(tmp_path / ("x" * 300)))
    assert (tmp_path / "certs").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("fails_at", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_behind(tmp_path, monkeypatch, function, fails_at, raised):
    there = made(tmp_path / "there")
    before = contents(tmp_path)
    calls: list[int] = []

    def fail(*args):
        calls.append(1)
        if len(calls) == fails_at:
            raise raised
        return real(*args)

    real = getattr(os, function)
    monkeypatch.setattr(module.os, function, fail)
    expected = (CheckpointError, KeyboardInterrupt)
    with pytest.raises(expected):
        make_certs(CertsConfig(tmp_path / "a" / "b", HOSTS, ("alice",)))
    assert contents(tmp_path) == before
    calls.clear()
    if fails_at <= 5:
        with pytest.raises(expected):
            make_certs(CertsConfig(there, clients=("bob",)))
        assert contents(tmp_path) == before


def test_nothing_outlives_the_ca(tmp_path):
    made(tmp_path, days=36500)
    until = {certificate(tmp_path / name).not_valid_after_utc.date() for name in ("ca.crt", "server/server.crt")}
    assert until == {(NOW + timedelta(days=36500)).date()}
    made(tmp_path, NOW + timedelta(days=36000), clients=("bob",), days=5000)
    assert certificate(tmp_path / "clients/bob/client.crt").not_valid_after_utc.date() in until


def test_files_are_loaded_from_the_whole_folder_and_from_the_part_of_it(folder):
    assert ServerFiles.load(folder) == ServerFiles.load(folder / "server")
    assert ServerFiles.load(folder).tokens_file == folder / "server" / "tokens.json"
    assert ClientFiles.load(folder, "bob") == ClientFiles.load(folder / "clients/bob", None)
    assert ClientFiles.load(folder / "clients/bob", "bob").name == "bob"
    assert ClientFiles.load(folder, "bob").certificate == (folder / "clients/bob/client.crt").read_bytes()


@pytest.mark.parametrize(
    "part, name, message",
    [
        ("", None, r"is of several clients: say which with --name \(alice, bob\)"),
        ("", "eve", r"--name eve: .* has no such client, it has alice, bob"),
        ("", "../clients/bob", "has no such client"),
        ("clients/bob", "alice", r"--name alice: .*bob is the folder of client 'bob'"),
        ("server", None, r"holds no client\.crt; give the folder"),
        ("nowhere", None, "is no folder that can be read; give the folder"),
        ("ca.crt", None, "is no folder that can be read; give the folder"),
    ],
)
def test_which_client_is_meant(folder, part, name, message):
    with pytest.raises(ConfigError, match=message):
        ClientFiles.load(folder / part, name)


@pytest.mark.parametrize("part", ["clients/bob", "clients", "nowhere", "x" * 300])
def test_which_server_is_meant(folder, part):
    with pytest.raises(ConfigError, match=r"(holds no server\.crt|is no folder .*); give the folder"):
        ServerFiles.load(folder / part)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    "suffix, damage, message",
    [
        (".crt", truncated, r"\.crt is not a PEM certificate"),
        (".crt", written(b""), r"\.crt is not a PEM certificate"),
        (".key", Path.unlink, r"\.key: No such file"),
        (".key", as_folder, r"\.key: Is a directory"),
        (".key", truncated, r"\.key is not a PEM private key"),
        (".key", encrypted, r"\.key is encrypted"),
        (".key", of_another, r"\.key does not belong to .*\.crt"),
        ("ca", Path.unlink, r"ca\.crt: No such file"),
        ("ca", truncated, r"ca\.crt is not a PEM certificate"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_damaged_certificates_and_keys_are_named_in_one_line(tmp_path, side, suffix, damage, message):
    path = made(tmp_path) / side
    damage(path.with_name("ca.crt") if suffix == "ca" else path.with_suffix(suffix))
    with pytest.raises(ConfigError, match=message) as error:
        ServerFiles.load(tmp_path) if side == SIDES[1] else ClientFiles.load(tmp_path, None)
    assert "\n" not in str(error.value)


TOKENS = [b"", b"[]", b"\xff", b'{"alice": 3}', b'{"alice": "abc"}', b'{"alice": "' + b"A" * 64 + b'"}']


@pytest.mark.parametrize("content", [None, *TOKENS])
def test_damaged_hashes_of_tokens(tmp_path, content):
    path = made(tmp_path) / "server/tokens.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokens\.json: No such" if content is None else r"tokens\.json must hold"):
        ServerFiles.load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"top secret", b"top\nsecret", b"\xff\xfe"])
def test_damaged_tokens(tmp_path, content):
    path = made(tmp_path) / "clients/alice/token"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="token: No such" if content is None else "token must hold a token") as error:
        ClientFiles.load(tmp_path, None)
    assert "top" not in str(error.value).removeprefix(str(tmp_path))


def test_certificates_out_of_date_are_told_with_how_to_renew_them(tmp_path):
    made(tmp_path, LONG_AGO, days=1)
    since = f"expired on {LONG_AGO + timedelta(days=1):%Y-%m-%d}.* clock says {NOW:%Y-%m-%d}"
    with pytest.raises(ConfigError, match=rf"server\.crt {since}.*snello certs FOLDER --host"):
        ServerFiles.load(tmp_path, NOW)
    with pytest.raises(ConfigError, match=rf"client\.crt {since}.*snello certs FOLDER --clients"):
        ClientFiles.load(tmp_path, None)
    early = LONG_AGO - timedelta(days=1)
    for load in (lambda: ServerFiles.load(tmp_path, early), lambda: ClientFiles.load(tmp_path, None, early)):
        with pytest.raises(ConfigError, match=rf"not valid before .* clock says {early:%Y-%m-%d}.*: is it right\?"):
            load()
    assert ServerFiles.load(tmp_path, LONG_AGO) and ClientFiles.load(tmp_path, None, LONG_AGO)


def named(*names: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, NOW, NOW + timedelta(days=1))
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def test_certificate_name(folder):
    pem = (folder / "clients/bob/client.crt").read_bytes()
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert certificate_name(pem) == certificate_name(b"a comment\n" + pem) == certificate_name(der) == "bob"


@pytest.mark.parametrize("data", [b"", b"bob", b"-----BEGIN CERTIFICATE-----", named(), named("alice", "bob")])
def test_what_has_no_single_name_is_refused(data):
    with pytest.raises(ConfigError, match="not a certificate with one common name"):
        certificate_name(data)


def test_pytorch_is_not_imported():
    code = "import sys, snello.split.security.certs, snello.split.security.doctor; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0
