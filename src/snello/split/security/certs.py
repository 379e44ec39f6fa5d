"""What `snello certs` makes: a small CA, a certificate for the server and for each client, and join tokens.

ca.crt, ca.key          the CA; its key makes further clients and is needed nowhere else
server/                 for the server: ca.crt, server.crt, server.key, tokens.json (hashes of the clients' tokens)
clients/NAME/           for one client: ca.crt, client.crt, client.key, token
"""

import hashlib
import ipaddress
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import AuthorityKeyIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from snello.config import CertsConfig
from snello.errors import CheckpointError, ConfigError
from snello.split.security.tls import date_problem, read_key, read_pair, read_tokens, when

CA_DAYS = 3650  # longer than what it signs, so that clients can be added for years
CLOCK_SKEW = timedelta(minutes=5)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Authority:
    """The CA: what signs the certificates of the server and the clients."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, now: datetime, days: int) -> "Authority":
        """A CA with a key of its own, valid from `now` on."""
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        name = _name(f"snello CA {identifier.digest.hex()[:8]}")  # errors name it: two CAs must not look the same
        builder = _builder(name, name, key, now, now + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(certificates=True), critical=True)
        return cls(builder.sign(key, SHA256()), key)

    @classmethod
    def read(cls, folder: Path, now: datetime) -> "Authority | None":
        """The CA in `folder`, or None without one.

        Raises:
            ConfigError: where half of it is missing, or it cannot be used.
        """
        certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
        if not certificate_file.exists() and not key_file.exists():
            return None
        for path in (certificate_file, key_file):
            if not path.exists():
                raise ConfigError(f"{path} is missing: bring it back, or make a new CA in another folder")
        certificate, key = read_pair(certificate_file, key_file)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{key_file} is not an elliptic-curve key: snello signs with no other")
        problem = date_problem(certificate, now)
        if problem is not None:
            raise ConfigError(f"{certificate_file} {problem}; make a new CA in another folder")
        if not _is_authority(certificate):
            raise ConfigError(f"{certificate_file} is not the certificate of a CA with a key identifier")
        return cls(certificate, key)

    def issue(
        self, name: str, key: ec.EllipticCurvePrivateKey, now: datetime, days: int, hosts: Sequence[str] = ()
    ) -> x509.Certificate:
        """A certificate that names `name`: of a server for `hosts`, or of a client without any.

        It ends with the CA at the latest.
        """
        end = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        builder = _builder(_name(name), self.certificate.subject, key, now, end)
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, SHA256())


@dataclass
class _Files:
    """What is to be written, by paths in the folder, and printed; nothing is written before all of it is known."""

    new: dict[str, bytes] = field(default_factory=dict)
    replaced: dict[str, bytes] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add_authority(self, authority: Authority, folder: Path) -> None:
        self.new |= {"ca.key": _key_pem(authority.key), "ca.crt": _pem(authority.certificate)}
        self.lines.append(f"{folder / 'ca.crt'}, ca.key: the CA, {_until(authority.certificate)}")

    def add_server(self, authority: Authority, folder: Path, hosts: Sequence[str], now: datetime, days: int) -> None:
        """A renewed certificate keeps its key: then one file changes, and key and certificate always fit."""
        key = _kept_key(folder / "server" / "server.key")
        if key is None:
            key = ec.generate_private_key(ec.SECP256R1())
            self.new["server/server.key"] = _key_pem(key)
        certificate = authority.issue("snello server", key, now, days, hosts)
        self.new["server/ca.crt"] = _pem(authority.certificate)
        self.replaced["server/server.crt"] = _pem(certificate)
        self.lines.append(f"{folder / 'server'}: for the server, as {', '.join(hosts)}, {_until(certificate)}")

    def add_client(self, authority: Authority, folder: Path, name: str, now: datetime, days: int) -> str:
        """Returns the SHA-256 hash of the client's token."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.issue(name, key, now, days)
        token = secrets.token_urlsafe(32)
        contents = (_pem(authority.certificate), _pem(certificate), _key_pem(key), f"{token}\n".encode())
        names = ("ca.crt", "client.crt", "client.key", "token")
        self.new |= {f"clients/{name}/{file}": content for file, content in zip(names, contents, strict=True)}
        self.lines.append(f"{folder / 'clients' / name}: for client {name!r}, {_until(certificate)}")
        return hashlib.sha256(token.encode()).hexdigest()


def make_certs(config: CertsConfig, now: datetime | None = None) -> list[str]:
    """Makes CA, server and clients, or adds to those that are there; returns lines that say what was made for whom.

    Raises:
        ConfigError: for a host that is no name or address, a client that exists already, or a CA that cannot be used.
        CheckpointError: where files cannot be written; then none of the new ones is there.
    """
    try:
        made = _prepare(config, now or datetime.now(timezone.utc))
        _put(config.folder, made.new | made.replaced)
    except OSError as error:
        raise CheckpointError(f"could not write to {config.folder}: {error} (nothing new was kept)") from error
    return made.lines


def _prepare(config: CertsConfig, now: datetime) -> _Files:
    folder, files = config.folder, _Files()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder")
    hosts = tuple(dict.fromkeys((*(_host(host) for host in config.host), *LOCAL_HOSTS)))
    authority = Authority.read(folder, now)
    tokens = {} if authority is None else _known_tokens(folder)
    clients = _new_clients(config, tokens)
    if authority is None:
        authority = Authority.new(now, max(config.days, CA_DAYS))
        files.add_authority(authority, folder)
    if config.host or not (folder / "server" / "server.crt").exists():
        files.add_server(authority, folder, hosts, now, config.days)
    for name in clients:
        tokens[name] = files.add_client(authority, folder, name, now, config.days)
    if clients or not (folder / "server" / "tokens.json").exists():
        files.replaced["server/tokens.json"] = (json.dumps(tokens, indent=2) + "\n").encode()
    if not files.replaced:
        raise ConfigError(f"{folder}: nothing to do; add clients with --clients, renew the server with --host")
    files.lines += _advice(config, clients, "server/server.crt" in files.replaced)
    return files


def _advice(config: CertsConfig, clients: Sequence[str], server: bool) -> list[str]:
    lines = []
    if clients:
        lines.append("hand out: to each client its own folder, on a way that nobody else reads; to the server, server/")
    else:
        lines.append("hand out: server/ to the server; the clients keep what they have")
    lines.append("keep secret: ca.key, which admits new clients and belongs on neither side; every .key and token")
    if server and not config.host:
        lines.append("the server's certificate is for this machine only; --host NAME makes one for other machines")
    return lines


def _new_clients(config: CertsConfig, tokens: Mapping[str, str]) -> list[str]:
    """The clients to make; beside others, the default one is no wish of a user who gives --host."""
    if tokens and config.host and config.clients == CertsConfig.clients:
        return []
    wanted = list(dict.fromkeys(config.clients))
    there = [name for name in wanted if name in tokens or (config.folder / "clients" / name).exists()]
    if there:
        raise ConfigError(
            f"--clients: {', '.join(there)} in {config.folder} exists already; name others, or for a new certificate "
            "and token remove clients/NAME and its line in server/tokens.json first"
        )
    return wanted


def _known_tokens(folder: Path) -> dict[str, str]:
    path = folder / "server" / "tokens.json"
    if path.exists():
        return read_tokens(path)
    if any(folder.glob("clients/*")):
        raise ConfigError(f"{path} is missing, and with it the clients made before: bring it back")
    return {}


def _kept_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    if not path.exists():
        return None
    key = read_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key; remove it for a new one")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _is_authority(certificate: x509.Certificate) -> bool:
    """Whether what it signs will be accepted; our own always is."""
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound):
        return False


def _key_usage(certificates: bool) -> x509.KeyUsage:
    """What a key may sign: certificates, or what a handshake signs."""
    others = ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"]
    none = dict.fromkeys([*others, "encipher_only", "decipher_only"], False)
    return x509.KeyUsage(digital_signature=not certificates, key_cert_sign=certificates, **none)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(text: str) -> str:
    """A name or IP address as it stands in the certificate; ConfigError for one that nobody can connect to."""
    wrong = ConfigError(f"--host must be names or IP addresses, as server.example 192.0.2.7, got {text!r}")
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if len(host) > 253 or labels[-1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
            raise wrong from None
        return host.lower()
    if address.is_unspecified:
        raise ConfigError(f"--host {text} means every address of a machine: give those that clients connect to")
    if "%" in host:
        raise wrong
    return str(address)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _until(certificate: x509.Certificate) -> str:
    return f"until {when(certificate.not_valid_after_utc)}"


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files, by their paths in `folder`, or none: those that replace others must come last."""
    with (
        _removing_new(folder) as made,
        tempfile.TemporaryDirectory(prefix=".new-", dir=folder, ignore_cleanup_errors=True) as staging,
    ):
        for name, content in files.items():
            _write(Path(staging, name), content)
        for name in files:
            target = folder / name
            _make_folder(target.parent, made)
            new = not target.exists()
            os.replace(Path(staging, name), target)
            if new:
                made.append(target)


@contextmanager
def _removing_new(folder: Path) -> Iterator[list[Path]]:
    """A list of files and folders that are removed again, the last first, where the block fails."""
    made: list[Path] = []
    try:
        _make_folder(folder, made)
        yield made
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        made.append(path)


def _write(path: Path, content: bytes) -> None:
    """Private from the start where it is a key or a token: between open and chmod somebody could read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    private = path.suffix == ".key" or path.name == "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
