"""Certificates of a small CA, and a gRPC server that asks for them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc

from snello.config import CertsConfig
from snello.split.security.certs import make_certs
from snello.split.security.tls import ServerFiles

HOSTS = ("server.example", "192.0.2.7")
NOW = datetime.now(timezone.utc)
LONG_AGO = NOW - timedelta(days=30)


def made(folder: Path, now: datetime = NOW, **settings) -> Path:
    settings = {"host": HOSTS, "clients": ("alice",), **settings}
    make_certs(CertsConfig(folder, **settings), now)
    return folder


@contextmanager
def grpc_server(folder: Path | None) -> Iterator[int]:
    """A gRPC server that tells the client's certified name; with mutual TLS, or in plaintext without a folder."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        return b",".join(context.auth_context().get("x509_common_name", [b"nobody"]))

    handler = grpc.method_handlers_generic_handler("t", {"Who": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    if folder is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        files = ServerFiles.load(folder)
        pair = [(files.key, files.certificate)]
        credentials = grpc.ssl_server_credentials(pair, root_certificates=files.ca, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()
