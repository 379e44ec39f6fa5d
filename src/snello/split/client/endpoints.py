"""Where a server is and how to show who we are: from an address and the folder that `snello certs` made."""

from functools import partial
from pathlib import Path
from typing import Any

from snello.config.units import is_loopback, parse_address
from snello.errors import ConfigError
from snello.split.client.connection import Connection, Endpoint
from snello.split.security import doctor
from snello.split.security.auth import Anyone, Credentials, Token
from snello.split.security.tls import ClientFiles
from snello.split.wire.frames import VERSION
from snello.split.wire.handshake import Hello, Welcome


def make_endpoint(
    address: str,
    certs: Path | None,
    name: str | None,
    *,
    plaintext: bool = False,
    credentials: Credentials | None = None,
) -> Endpoint:
    """The server at host:port, with what `snello certs` made in a folder for the client of this name.

    Without `certs` it is plaintext, off loopback only where `plaintext` asks for it. `credentials` are shown instead
    of the token in the folder.

    Raises:
        ConfigError: where the files cannot be used, or plaintext would leave this machine.
    """
    explain = partial(doctor.explain, address, certs, name)
    if certs is not None:
        files = ClientFiles.load(certs, name)
        shown = (credentials or Token(files.name, files.token)).credentials()
        return Endpoint(address, files.ca, files.certificate, files.key, shown, explain)
    if not plaintext and not is_loopback(parse_address(address, "ADDRESS")[0]):
        raise ConfigError(
            f"{address} is not on this machine: give --certs, the folder that `snello certs` made for this client"
        )
    return Endpoint(address, credentials=(credentials or Anyone()).credentials(), explain=explain)


def describe(endpoint: Endpoint, patience_seconds: float = 20.0) -> Welcome:
    """The settings of the server at `endpoint`.

    Raises:
        NetworkError: where it cannot be reached.
        Refused: where it does not admit us.
    """
    connection = Connection(endpoint, lambda: Hello("describe"), patience_seconds=patience_seconds)
    try:
        return connection.open()[0]
    finally:
        connection.close()


def probe(endpoint: Endpoint) -> dict[str, Any]:
    """What `snello doctor` asks a server."""
    welcome = describe(endpoint)
    return {"time": welcome.time, "version": welcome.version, "protocol": VERSION, "token": "accepted"}
