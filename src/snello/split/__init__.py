"""Split learning: one Vision Transformer in two halves, in one process or across a network."""

import os
import sys

# Workers that load pictures are forked while a connection is open. They never touch it; gRPC's own preparations for a
# fork restart its threads in the worker, which abort it. gRPC reads this when it is imported.
_FORKS = "GRPC_ENABLE_FORK_SUPPORT"
WORKER_CONTEXT = None if "grpc" not in sys.modules or os.environ.get(_FORKS) == "0" else "forkserver"
"""How workers are started: as usual (None), unless gRPC was imported before snello and would not let forked ones be."""
os.environ.setdefault(_FORKS, "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
