"""Frames as a stream of chunks, and back: what a connection carries.

A frame is sent as chunks of equal size, about CHUNK_BYTES, the last a little shorter; a chunk never holds parts of two
frames. What comes in is put together in one buffer, whose size is checked against the limit when the header is there,
before it is taken.
"""

import math
from collections.abc import Iterator, Sequence

from snello.errors import ProtocolError
from snello.split.wire.frames import HEADER, Buffer, Frame, Header, parse_header, write

METHOD = "/snello.Split/Train"
"""The gRPC method that carries the frames."""
CREDENTIALS = "snello-credentials"
"""The metadata of a call in which a client shows who it is."""
CHUNK_BYTES = 1 << 20
"""64 KiB chunks are half as fast, larger ones no faster; and what a peer can make us buffer stays small."""
MAX_CHUNK_BYTES = CHUNK_BYTES * 3 // 2
"""What the only chunk of a frame that is just too small for two may have."""


def chunk_size(total: int, about: int = CHUNK_BYTES) -> int:
    """Bytes of each chunk of a frame of `total` bytes: equal ones, as a small rest would cost a message of its own."""
    return max(1, math.ceil(total / max(1, round(total / about))))


def keep_blocks() -> None:
    """Lets the C library keep freed blocks of message size for the next message.

    glibc asks the system for every large block anew, whose pages then cost more than copying into them (1.2 ms
    instead of 0.06 for 2 MB), until it has seen a block of that size freed. Elsewhere this does nothing.
    """
    bytearray((32 << 20) - (1 << 16))


def chunks(buffers: Sequence[Buffer], about: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a frame in chunks of equal size."""
    size = chunk_size(sum(map(len, buffers)), about)
    parts: list[Buffer] = []
    room = size
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view) >= room:
            yield b"".join((*parts, view[:room]))
            view, parts, room = view[room:], [], size
        if len(view):
            parts.append(view)
            room -= len(view)
    if parts:
        yield b"".join(parts)


def of(frame: Frame) -> list[bytes]:
    """A frame as chunks, ready to be sent."""
    return list(chunks(write(frame)))


class Assembler:
    """Puts chunks together to frames.

    Args:
        max_body_bytes: of a frame; may be changed between frames.
        about: the size of chunks, as for `chunks`.
    """

    def __init__(self, max_body_bytes: int, about: int = CHUNK_BYTES) -> None:
        self.max_body_bytes, self._about = max_body_bytes, about
        self.header: Header | None = None
        """What the frame begins with that is coming in; None between frames."""
        self._buffer = bytearray()
        self._at = self._size = 0

    def add(self, chunk: bytes) -> bytearray | None:
        """The whole frame, where the chunk completes one.

        Raises:
            ProtocolError: for anything that `chunks` does not make, or a frame beyond the limit.
        """
        if self.header is None:
            self.header = parse_header(chunk, self.max_body_bytes)
            total = HEADER.size + self.header.body_bytes
            self._buffer, self._at, self._size = bytearray(total), 0, chunk_size(total, self._about)
        left = len(self._buffer) - self._at
        if len(chunk) != min(left, self._size):
            raise ProtocolError(f"a chunk of {len(chunk)} bytes came where {min(left, self._size)} were due")
        self._buffer[self._at : self._at + len(chunk)] = chunk
        self._at += len(chunk)
        if self._at < len(self._buffer):
            return None
        frame, self._buffer, self.header = self._buffer, bytearray(), None
        return frame
