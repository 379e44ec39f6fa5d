"""How a client shows who it is, and how a server decides: tokens, certificates, both, or signed tickets."""

import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from snello.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Credentials(Protocol):
    """How a client proves who it is."""

    def credentials(self) -> dict[str, str]:
        """What is sent with every connection, and never logged; by default nothing."""
        return {}


class Authenticator(Protocol):
    """How a server decides who a client is."""

    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        """The client's name, by what it sent and the certificate that it proved to own; None where not admitted."""


class Anyone(Credentials, Authenticator):
    """Admits every client under one name: for both halves in one process, or on one machine."""

    @override
    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        return "anyone"


class Token(Credentials):
    """Shows a client's name and secret to the server."""

    def __init__(self, name: str, token: str) -> None:
        self.name, self._token = name, token

    @override
    def credentials(self) -> dict[str, str]:
        return {"name": self.name, "token": self._token}


class Tokens(Authenticator):
    """Admits clients that know the secret of their name; the server keeps only hashes.

    Args:
        hashes: SHA-256 of each client's token in hexadecimal, by name; or a JSON file with them, read anew for every
            client, so that a client is admitted or shut out without a restart.
    """

    def __init__(self, hashes: Mapping[str, str] | Path) -> None:
        self._hashes = hashes
        self._read()

    @override
    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        name, token, hashes = credentials.get("name", ""), credentials.get("token", ""), self._read()
        # In constant time, also for a name that is not known.
        same = hmac.compare_digest(hash_token(token).encode(), hashes.get(name, hash_token("")).encode())
        return name if same and token and name in hashes else None

    def _read(self) -> Mapping[str, str]:
        if not isinstance(self._hashes, Path):
            return self._hashes
        try:
            hashes = json.loads(self._hashes.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the tokens in {self._hashes} cannot be read: {error}") from None
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            raise ConfigError(f"{self._hashes} must hold a JSON object of names and hashes")
        return hashes


class Certificates(Authenticator):
    """Admits clients whose certificate the connection has verified (mutual TLS), by the certificate's name."""

    @override
    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        return certificate_name if certificate_name and NAME.fullmatch(certificate_name) else None


class Both(Authenticator):
    """Admits clients that two authenticators know by the same name."""

    def __init__(self, first: Authenticator, second: Authenticator) -> None:
        self._first, self._second = first, second

    @override
    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        first = self._first.identify(credentials, certificate_name)
        second = self._second.identify(credentials, certificate_name)
        return first if first == second else None


class Tickets(Authenticator):
    """Admits clients with a ticket signed with the server's key (at least 16 bytes), until it expires."""

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ConfigError(f"the key of tickets must have at least 16 bytes, got {len(key)}")
        self._key = key

    def issue(self, name: str, seconds: float) -> dict[str, str]:
        """Credentials for `name`, valid for so long."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"a name has letters, digits, dots, dashes and underscores, got {name!r}")
        expires = str(int(time.time() + seconds))
        return {"name": name, "expires": expires, "signature": self._sign(name, expires)}

    @override
    def identify(self, credentials: Mapping[str, str], certificate_name: str | None = None) -> str | None:
        name, expires = credentials.get("name", ""), credentials.get("expires", "")
        signature = credentials.get("signature", "").encode("utf-8", "surrogatepass")
        signed = hmac.compare_digest(signature, self._sign(name, expires).encode())
        return name if signed and expires.isdecimal() and len(expires) < 20 and int(expires) > time.time() else None

    def _sign(self, name: str, expires: str) -> str:
        return hmac.new(self._key, f"{name}\n{expires}".encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def hash_token(token: str) -> str:
    """What the server keeps of a token: it is random and long, so a plain hash gives nothing away."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
