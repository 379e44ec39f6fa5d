"""What `snello doctor` finds between here and a server, in the order in which a connection is made.

Here are plain sockets and Python's TLS, whose errors say more than gRPC's; what only the server can tell comes from a
`probe` that the caller gives.
"""

import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID
from rich.console import Console
from rich.text import Text

from snello.config import DoctorConfig
from snello.config.units import is_loopback, parse_address
from snello.errors import ConfigError, SnelloError, printable
from snello.split.security.tls import RENEW_CLIENT, RENEW_SERVER, ClientFiles, certificate_hosts, date_problem, when

TIMEOUT_S = 5.0
MAX_CLOCK_S = 60.0
MAX_TEXT = 400
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 sends first: a fixed text, and settings that change nothing."""
FRAME_BYTES, SETTINGS = 9, 4
TLS_ALERT = b"\x15\x03"

OTHER_CA = "use the folder that was made together with this server's certificate (or something on the way decrypts TLS)"
NOT_SNELLO = "is it the port of `snello serve`?"

Address = tuple[str, int]
"""A numeric host and a port."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is well, what was seen, and what to do."""

    what: str
    ok: bool
    text: str
    advice: str = ""

    def __post_init__(self) -> None:
        """Names and reasons come from the other side: no control characters reach the terminal, nor endless texts."""
        text = printable(self.text)
        object.__setattr__(self, "text", text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "...")

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


def examine(config: DoctorConfig, probe: Callable[[], dict[str, Any]] | None = None) -> list[Finding]:
    """Looks at name, port, TLS and both certificates and, with a `probe`, at clock, version and token.

    It ends with the first failure that leaves the rest open. The probe asks the server over gRPC: its `time` (seconds
    since 1970), `version`, `protocol` (an int), and `token`, `accepted` or why not; it may raise a SnelloError.
    """
    findings = list(_connection(config))
    if not all(finding.ok for finding in findings):
        return findings
    if not config.certs and not is_loopback(parse_address(config.address, "ADDRESS")[0]):
        text = "the server takes plaintext and is not on this machine: everybody on the way can read and change it"
        advice = "let it `snello serve --certs`, and give --certs here"
        return [*findings[:-1], Finding("encryption", False, text, advice)]
    return findings if probe is None else findings + list(_answers(probe))


def explain(address: str, certs: Path | None, name: str | None) -> str | None:
    """Why a connection cannot be made, and what to do, in one line; None where all is well up to TLS."""
    findings = _connection(DoctorConfig(address, certs, name))
    return next((str(finding) for finding in findings if not finding.ok), None)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Prints one line per finding."""
    width = max((len(finding.what) for finding in findings), default=0)
    for finding in findings:
        marker = Text("  ok", "green") if finding.ok else Text("FAIL", "bold red")
        console.print(Text.assemble(marker, f"  {finding.what:{width}}  {finding}"), soft_wrap=True)


def to_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as values that JSON can hold."""
    return [asdict(finding) for finding in findings]


def _connection(config: DoctorConfig) -> Iterator[Finding]:
    """From the name to the first bytes of HTTP/2; ends after a failure."""
    host, port = parse_address(config.address, "ADDRESS")
    try:
        addresses = _resolve(host, port)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        advice = "is the name spelt right, and is this machine online?"
        yield Finding("name", False, f"{host} cannot be resolved: {reason}", advice)
        return
    yield Finding("name", True, f"{host} is {', '.join(dict.fromkeys(where for where, _ in addresses))}")
    address, finding = _reach(addresses, port)
    yield finding
    if address is None:
        return
    if config.certs is None:
        yield _plaintext(address)
        return
    try:
        files = ClientFiles.read(config.certs, config.name)
    except ConfigError as error:
        yield Finding("our files", False, str(error))
        return
    yield from _tls(address, host, files)


def _resolve(host: str, port: int) -> list[Address]:
    return [(str(found[4][0]), port) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _reach(addresses: Sequence[Address], port: int) -> tuple[Address | None, Finding]:
    """The first address that accepts a connection, if any."""
    failures: dict[str, str] = {}
    for address in addresses:
        try:
            _connect(address).close()
        except OSError as error:
            text, advice = _unreached(error)
            failures[f"{address[0]} port {port} {text}"] = advice
        else:
            return address, Finding("port", True, f"{address[0]} port {port} accepts connections")
    advice = "; ".join(dict.fromkeys(failures.values()))
    return None, Finding("port", False, ", ".join(failures), advice)


def _connect(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=TIMEOUT_S)


def _unreached(error: OSError) -> tuple[str, str]:
    """What happened, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        advice = "is `snello serve` running, on this port, and with a --listen that other machines reach?"
        return "refuses connections", advice
    if isinstance(error, TimeoutError):
        advice = "is the machine on, and does a firewall let the port through?"
        return f"does not answer within {TIMEOUT_S:.0f} s", advice
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"is unreachable ({error.strerror})", "is there a network to it: the same LAN, a VPN, a route?"
    return f"cannot be connected to: {error.strerror or error}", "is the address right?"


def _plaintext(address: Address) -> Finding:
    if _speaks_plaintext(address):
        return Finding("encryption", True, "none: the server takes plaintext")
    if _speaks_tls(address):
        advice = "give --certs with the clients/NAME folder that you were handed"
        return Finding("encryption", False, "the server speaks TLS, and no --certs is given here", advice)
    return Finding("encryption", False, "what answers is not a gRPC server", NOT_SNELLO)


def _speaks_plaintext(address: Address) -> bool:
    """Whether HTTP/2 is answered without TLS."""
    try:
        with _connect(address) as connection:
            connection.sendall(PREFACE)
            return _is_settings(_receive(connection))
    except OSError:
        return False


def _speaks_tls(address: Address) -> bool:
    try:
        _handshake(address, _context(None, verify=False), None).close()
    except OSError as error:
        return _alert(error) is not None
    return True


def _tls(address: Address, host: str, files: ClientFiles) -> Iterator[Finding]:
    """TLS, the server's certificate, our own, and whether the server takes it."""
    failure: ssl.SSLCertVerificationError | None = None
    try:
        try:
            connection = _handshake(address, _context(files, verify=True), host)
        except ssl.SSLCertVerificationError as error:
            failure = error
            connection = _handshake(address, _context(files, verify=False), host)  # only to read its certificate
    except OSError as error:
        yield from _no_tls(address, files, error)
        return
    with connection:
        if connection.selected_alpn_protocol() != "h2":
            yield Finding("TLS", False, f"{connection.version()}, but without HTTP/2: not a gRPC server", NOT_SNELLO)
            return
        yield Finding("TLS", True, f"{connection.version()} with HTTP/2")
        judged = [*_judge(connection.getpeercert(binary_form=True) or b"", host, files, failure), _own_dates(files)]
        yield from judged
        if all(finding.ok for finding in judged):
            yield _admission(connection, files)


def _context(files: ClientFiles | None, verify: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_verify_locations(cafile=files.folder / "ca.crt")
        context.load_cert_chain(files.folder / "client.crt", files.folder / "client.key")
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _handshake(address: Address, context: ssl.SSLContext, host: str | None) -> ssl.SSLSocket:
    connection = _connect(address)
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def _no_tls(address: Address, files: ClientFiles, error: OSError) -> Iterator[Finding]:
    """Why a handshake failed otherwise than by the server's certificate."""
    alert = _alert(error)
    if alert is not None:
        own = _own_dates(files)  # TLS 1.2 refuses a client's certificate here, TLS 1.3 at the first read
        yield _refused(alert, files) if own.ok else own
    elif _speaks_plaintext(address):
        advice = "start the server with --certs (on this machine, `snello join` without --certs reaches it as it is)"
        yield Finding("TLS", False, "the server speaks plaintext, and --certs is given here", advice)
    else:
        reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or error
        yield Finding("TLS", False, f"no TLS handshake: {reason}", NOT_SNELLO)


def _judge(
    der: bytes, host: str, files: ClientFiles, failure: ssl.SSLCertVerificationError | None
) -> Iterator[Finding]:
    """What is right and wrong with the server's certificate; each by itself, as OpenSSL names only the first."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        ca = x509.load_pem_x509_certificate(files.ca)
        signed = failure is None or _is_signed_by(certificate, ca)
        issuer, ours = _common_name(certificate.issuer), _common_name(ca.subject)
    except ValueError as error:
        yield Finding("server's CA", False, f"the server's certificate cannot be read: {error}", NOT_SNELLO)
        return
    if not signed:
        text = f"the server's certificate is signed by {issuer!r}, not by our CA {ours!r}"
        yield Finding("server's CA", False, text, OTHER_CA)
        return
    problem, hosts = date_problem(certificate), certificate_hosts(certificate)
    named = failure is None or _is_for(host, hosts)
    if failure is not None and problem is None and named:
        yield Finding("server's CA", False, f"the server's certificate is refused: {failure.verify_message}", OTHER_CA)
        return
    yield Finding("server's CA", True, f"the server's certificate is signed by our CA {ours!r}")
    text = f"the server's certificate {problem or f'is valid until {when(certificate.not_valid_after_utc)}'}"
    advice = f"is this machine's clock right? Otherwise: {RENEW_SERVER}"
    yield Finding("server's dates", not problem, text, advice if problem else "")
    text = f"the server's certificate is for {', '.join(hosts) or 'no name at all'}"
    advice = "" if named else f"connect to one of those, or: {RENEW_SERVER}"
    yield Finding("server's names", named, text if named else f"{text}, not for {host}", advice)


def _is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _is_for(host: str, hosts: Sequence[str]) -> bool:
    host = host.lower()
    return any(name.lower() in (host, f"*.{host.partition('.')[2]}") for name in hosts)


def _own_dates(files: ClientFiles) -> Finding:
    certificate = x509.load_pem_x509_certificate(files.certificate)
    problem, until = date_problem(certificate), when(certificate.not_valid_after_utc)
    if problem is not None:
        return Finding("our certificate", False, f"the certificate of client {files.name!r} {problem}", RENEW_CLIENT)
    return Finding("our certificate", True, f"of client {files.name!r}, valid until {until}")


def _admission(connection: ssl.SSLSocket, files: ClientFiles) -> Finding:
    """Whether the server still talks after the handshake: in TLS 1.3 it looks at our certificate only then."""
    try:
        received = _greeting(connection)
    except TimeoutError:
        return Finding("admission", False, "the server says nothing after the handshake", NOT_SNELLO)
    except OSError as error:
        return _refused(_alert(error) or "connection closed", files)
    if not received:
        return _refused("connection closed", files)
    if not _is_settings(received):
        return Finding("admission", False, "what answers is not a gRPC server", NOT_SNELLO)
    return Finding("admission", True, f"the server admits client {files.name!r}")


def _refused(reason: str, files: ClientFiles) -> Finding:
    text = f"the server refuses the certificate of client {files.name!r}: {reason}"
    advice = "is it of another CA than the server's, or the server's clock wrong? Ask for a new clients/NAME folder"
    return Finding("admission", False, text, advice)


def _alert(error: OSError) -> str | None:
    """What the other side objected to, where it speaks TLS and named it."""
    reason = getattr(error, "reason", None) or ""
    return reason.partition("ALERT_")[2].lower().replace("_", " ") or None


def _greeting(connection: ssl.SSLSocket) -> bytes:
    """What comes first; gRPC speaks unasked. To send before would lose why a server closed: a reset drops its alert."""
    connection.settimeout(TIMEOUT_S / 5)
    try:
        return _receive(connection)
    except TimeoutError:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(PREFACE)
        return _receive(connection)


def _receive(connection: socket.socket) -> bytes:
    """The header of the first frame of HTTP/2; shorter where the other side ends before."""
    received = b""
    while len(received) < FRAME_BYTES and not received.startswith(TLS_ALERT):
        chunk = connection.recv(FRAME_BYTES - len(received))
        if not chunk:
            break
        received += chunk
    return received


def _is_settings(header: bytes) -> bool:
    """Every server of HTTP/2 begins with its settings, on stream 0."""
    return len(header) == FRAME_BYTES and header[3] == SETTINGS and not any(header[5:])


def _answers(probe: Callable[[], dict[str, Any]]) -> Iterator[Finding]:
    """What only the server knows: its clock, its version, and whether our token is good."""
    from snello.split.wire.frames import VERSION  # PyTorch

    begin = time.time()
    try:
        reply = probe()
    except SnelloError as error:
        yield Finding("server", False, str(error))
        return
    offset_s = reply["time"] - (begin + time.time()) / 2
    text = f"the server's is {abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} ours"
    advice = "" if abs(offset_s) <= MAX_CLOCK_S else "set both by NTP: certificates are valid by the clock"
    yield Finding("clock", not advice, text, advice)
    yield _same("version", reply["version"], version("snello"), "install the same snello on both sides")
    yield _same("protocol", reply["protocol"], VERSION, "the two cannot talk; install the same snello on both sides")
    admitted = reply["token"] == "accepted"
    advice = "" if admitted else "is it the token of this server's last `snello certs`? Ask for the clients/NAME folder"
    yield Finding("token", admitted, str(reply["token"]), advice)


def _same(what: str, theirs: object, ours: object, advice: str) -> Finding:
    if theirs == ours:
        return Finding(what, True, f"{ours} on both sides")
    return Finding(what, False, f"{theirs} on the server, {ours} here", advice)
