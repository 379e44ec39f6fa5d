"""What crosses a connection, as bytes; no network here.

frames.py     a header and typed arrays; all bytes are counted here
chunks.py     frames as a stream of chunks
handshake.py  what both sides tell each other first
refusals.py   why a side ends the connection
"""
