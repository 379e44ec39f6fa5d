"""The server of split learning.

command.py    `snello serve`: from settings to a running server
streams.py    gRPC streams; the only place here that knows the network
registry.py   whose sessions there are, and where a client goes on
sessions.py   every frame applied once
half.py       the server's half in training
telemetry.py  metrics, log, progress
"""
