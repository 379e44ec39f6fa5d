"""The Hugging Face hub, told to answer at once where it cannot be reached."""

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from logging import ERROR

from huggingface_hub import constants
from huggingface_hub.utils import logging


def hub_is_out_of_reach() -> bool:
    """Whether the hub's name cannot even be resolved; behind a proxy that says nothing."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def hub(offline: bool) -> Iterator[None]:
    """The hub's client told to look into its cache only, instead of trying for a minute; and without its warnings."""
    before, verbosity = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    constants.HF_HUB_OFFLINE = before or offline
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
