"""Why a server ends a connection: a code, a reason, and what the user of the client can do.

A refusal travels as the status of the gRPC call, in words, so that also a client of another version can read it.
"""

import re
from enum import Enum

from snello.errors import SnelloError


class Code(str, Enum):
    """The kinds of refusal."""

    VERSION = "version"
    CREDENTIALS = "credentials"
    MISMATCH = "mismatch"
    FULL = "full"
    UNKNOWN_SESSION = "unknown-session"
    NO_CHECKPOINT = "no-common-checkpoint"
    MALFORMED = "malformed"
    OUT_OF_TURN = "out-of-turn"
    TOO_LARGE = "too-large"
    TOO_SLOW = "too-slow"
    IDLE = "idle"
    SHUTDOWN = "shutdown"
    STORAGE = "storage"
    STORE = "store"
    UNKNOWN_BASIS = "unknown-basis"
    NOT_FINITE = "not-finite"
    TAKEN_OVER = "taken-over"
    FORBIDDEN = "forbidden"
    INTERNAL = "internal"


ADVICE = {
    Code.VERSION: "install the same version of snello on both sides",
    Code.CREDENTIALS: "check --certs and --name; `snello doctor` looks closer; who runs the server can make new ones",
    Code.MISMATCH: "start the server with the settings that the run began with, or begin a new run with another --out",
    Code.FULL: "wait until a session ends, or raise --max-sessions, --max-memory or --max-disk of `snello serve`",
    Code.UNKNOWN_SESSION: "put the server's --out folder back, or begin a new run with another --out",
    Code.NO_CHECKPOINT: "put the deleted checkpoints back, or begin a new run with another --out",
    Code.MALFORMED: "install the same version of snello on both sides; report it if they are",
    Code.OUT_OF_TURN: "resume it with --resume; report it if it comes back",
    Code.TOO_LARGE: "install the same version of snello on both sides; report it if they are",
    Code.TOO_SLOW: "use a faster link, a smaller --batch-size or a --split.codec that sends less",
    Code.IDLE: "resume it with --resume, or raise --idle-seconds of `snello serve`",
    Code.SHUTDOWN: "resume it with --resume when the server runs again",
    Code.STORAGE: "who runs the server must free space in its --out folder; then resume it with --resume",
    Code.STORE: "put the session's file back in the server's --out folder, or begin a new run with another --out",
    Code.UNKNOWN_BASIS: "report it: the client sends such a frame again with its basis",
    Code.NOT_FINITE: "begin again with a lower --lr or more --warmup of `snello serve`, or with --precision fp32",
    Code.TAKEN_OVER: "another process uses the same --out: stop one of them",
    Code.FORBIDDEN: "ask who runs the server",
    Code.INTERNAL: "look into the server's log; resume it with --resume",
}
TRANSIENT = (Code.TOO_SLOW, Code.IDLE, Code.SHUTDOWN)
"""After these a client connects again by itself."""

_TEXT = re.compile(r"snello/([a-z-]+)(?:/(\d{1,20}))?: (.*)", re.DOTALL)


class Refused(SnelloError):
    """One side ended the connection, and why: with both values where two differ; of SHUTDOWN, with the saved `step`."""

    def __init__(self, code: Code, reason: str, step: int | None = None) -> None:
        super().__init__(f"{reason} ({code.value}); {ADVICE[code]}")
        self.code, self.reason, self.step = code, reason, step

    def to_text(self) -> str:
        """For the status of a call: short, one line, ASCII, as HTTP/2 headers want it."""
        reason = " ".join(self.reason.split()).encode("ascii", "backslashreplace").decode()[:1000]
        return f"snello/{self.code.value}{'' if self.step is None else f'/{self.step}'}: {reason}"

    @classmethod
    def from_text(cls, text: str) -> "Refused | None":
        """What `to_text` was given; None for a status that is none of ours."""
        match = _TEXT.fullmatch(text)
        if match is None or match[1] not in Code._value2member_map_:
            return None
        return cls(Code(match[1]), match[3], None if match[2] is None else int(match[2]))
