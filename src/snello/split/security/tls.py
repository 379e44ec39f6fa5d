"""What `snello certs` made, read back and checked: certificates, keys and tokens of the server and of each client."""

import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from snello.errors import ConfigError

RENEW_SERVER = "on the server, `snello certs FOLDER --host NAME` makes a new one"
RENEW_CLIENT = (
    "who runs the server makes a new one: remove clients/NAME and its line in server/tokens.json, then "
    "`snello certs FOLDER --clients NAME`"
)
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what may stand in a gRPC header
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ServerFiles:
    """What a server shows and checks; `tokens` are SHA-256 hashes, by the name of the client."""

    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    tokens: dict[str, str] = field(repr=False)
    tokens_file: Path

    @classmethod
    def load(cls, folder: Path, now: datetime | None = None) -> "ServerFiles":
        """The files in the folder that `snello certs` made, or in its server/ folder.

        Raises:
            ConfigError: where one is missing, damaged or does not fit the others, or the certificate is out of date.
        """
        place = folder / "server" if os.path.isdir(folder / "server") else folder
        _require_file(place / "server.crt", f"--certs {folder}", "the folder that `snello certs` made, or its server/")
        ca, certificate, key = _read_chain(place, "server")
        problem = date_problem(read_certificate(place / "server.crt"), now)
        if problem is not None:
            raise ConfigError(f"{place / 'server.crt'} {problem}; {RENEW_SERVER}")
        tokens_file = place / "tokens.json"
        return cls(ca, certificate, key, read_tokens(tokens_file), tokens_file)


@dataclass(frozen=True)
class ClientFiles:
    """What a client shows and checks; `name` is the one in its certificate."""

    folder: Path
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    token: str = field(repr=False)
    name: str

    @classmethod
    def load(cls, folder: Path, name: str | None, now: datetime | None = None) -> "ClientFiles":
        """The files in the folder that `snello certs` made, of the client `name`, or in a clients/NAME folder.

        Raises:
            ConfigError: where one is missing, damaged or does not fit the others, the certificate is out of date, or
                it is open which client is meant.
        """
        files = cls.read(folder, name)
        problem = date_problem(x509.load_pem_x509_certificate(files.certificate), now)
        if problem is not None:
            raise ConfigError(f"{files.folder / 'client.crt'} {problem}; {RENEW_CLIENT}")
        return files

    @classmethod
    def read(cls, folder: Path, name: str | None) -> "ClientFiles":
        """The same, also where the certificate is out of date."""
        place = _client_folder(folder, name)
        ca, certificate, key = _read_chain(place, "client")
        found = certificate_name(certificate)
        if name is not None and name != found:
            raise ConfigError(f"--name {name}: {place} is the folder of client {found!r}")
        return cls(place, ca, certificate, key, _read_token(place / "token"), found)


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file; the first, where there are several.

    Raises:
        ConfigError: where the file cannot be read or holds none.
    """
    content = _read(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError:
        raise ConfigError(f"{path} is not a PEM certificate") from None


def read_key(path: Path) -> PrivateKeyTypes:
    """The private key in a PEM file.

    Raises:
        ConfigError: where the file cannot be read, holds none, or is encrypted.
    """
    content = _read(path)
    try:
        return load_pem_private_key(content, password=None)
    except TypeError:
        raise ConfigError(f"{path} is encrypted; snello reads keys without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is not a PEM private key") from None


def read_pair(certificate: Path, key: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """A certificate and its private key.

    Raises:
        ConfigError: where one of them cannot be read, or the key does not belong to the certificate.
    """
    pair = read_certificate(certificate), read_key(key)
    if pair[0].public_key() != pair[1].public_key():
        raise ConfigError(f"{key} does not belong to {certificate}: the files of two certificates were mixed up")
    return pair


def read_tokens(path: Path) -> dict[str, str]:
    """The SHA-256 hash of each client's token, by the client's name.

    Raises:
        ConfigError: where the file cannot be read or holds anything else.
    """
    content = _read(path)
    try:
        tokens = json.loads(content)
    except ValueError:
        tokens = None
    values = tokens.values() if isinstance(tokens, dict) else [None]
    if not isinstance(tokens, dict) or not all(isinstance(v, str) and _SHA256.fullmatch(v) for v in values):
        raise ConfigError(f'{path} must hold {{"client": "SHA-256 of its token as 64 hex digits"}}')
    return tokens


def certificate_name(pem_or_der: bytes) -> str:
    """The common name (CN) in a certificate.

    Raises:
        ConfigError: where it is no certificate, or has not exactly one such name.
    """
    try:
        load = x509.load_pem_x509_certificate if b"-----BEGIN" in pem_or_der else x509.load_der_x509_certificate
        (name,) = load(pem_or_der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        raise ConfigError("not a certificate with one common name (CN)") from None
    return str(name.value)


def certificate_hosts(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def date_problem(certificate: x509.Certificate, now: datetime | None = None) -> str | None:
    """Why a certificate is not valid at the time `now` (default: this moment), or None."""
    now = now or datetime.now(timezone.utc)
    clock = f"this machine's clock says {when(now)}"
    if now < certificate.not_valid_before_utc:
        return f"is not valid before {when(certificate.not_valid_before_utc)} ({clock}: is it right?)"
    if now > certificate.not_valid_after_utc:
        return f"expired on {when(certificate.not_valid_after_utc)} ({clock})"
    return None


def when(moment: datetime) -> str:
    """A moment as text, in UTC."""
    return f"{moment.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _client_folder(folder: Path, name: str | None) -> Path:
    if os.path.isfile(folder / "client.crt"):  # pathlib raises where a folder may not be read
        return folder
    names = sorted(path.parent.name for path in folder.glob("clients/*/client.crt"))
    if not names:
        wanted = "the folder that `snello certs` made, or a clients/NAME folder of it"
        _require_file(folder / "client.crt", f"--certs {folder}", wanted)
    if name is None and len(names) > 1:
        raise ConfigError(f"--certs {folder} is of several clients: say which with --name ({', '.join(names)})")
    if name is not None and name not in names:
        raise ConfigError(f"--name {name}: {folder} has no such client, it has {', '.join(names)}")
    return folder / "clients" / (name or names[0])


def _require_file(path: Path, source: str, wanted: str) -> None:
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{source} is no folder that can be read; give {wanted}")
    if not os.path.isfile(path):
        raise ConfigError(f"{source} holds no {path.name}; give {wanted}")


def _read_chain(folder: Path, side: str) -> tuple[bytes, bytes, bytes]:
    """The bytes of ca.crt, and of the certificate and key of a side, checked against each other."""
    ca, certificate, key = folder / "ca.crt", folder / f"{side}.crt", folder / f"{side}.key"
    read_certificate(ca)
    read_pair(certificate, key)
    return _read(ca), _read(certificate), _read(key)


def _read_token(path: Path) -> str:
    token = _read(path).decode("ascii", errors="replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{path} must hold a token: one line without spaces")
    return token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
