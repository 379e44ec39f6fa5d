"""A finished run of `snello join` in use: the client's half from the run folder, the server's half at its server."""

from pathlib import Path

import torch
from torch import Tensor

from snello.devices import Precision
from snello.files import load_tensors
from snello.runs.checkpoint import load_into, with_weights
from snello.runs.folder import RunFolder
from snello.split.build import cut_model, make_codec, modules_of
from snello.split.client.connection import Connection
from snello.split.client.endpoints import make_endpoint
from snello.split.client.link import NetworkLink
from snello.split.halves import ClientHalf
from snello.split.learner import Evaluator
from snello.split.ledger import Ledger
from snello.split.wire.frames import Kind, control, weights_of
from snello.split.wire.handshake import Hello, make_terms


class JoinedModel(Evaluator):
    """Normalised pictures (B, 3, H, W) to logits (B, C), with both halves at their best epoch.

    Raises:
        CheckpointError: where the weights do not fit.
        NetworkError: where the server cannot be reached.
        Refused: where it does not know the session or does not admit us.
    """

    def __init__(self, run: RunFolder, device: torch.device, precision: Precision) -> None:
        config, resolved = run.read()
        assert resolved.server is not None
        server, num_classes = resolved.server, len(resolved.classes)
        with torch.device("meta"):
            vit = run.model()
        codec = make_codec(config, str(resolved.codec), vit.embed_dim).to(device)
        lower, _ = cut_model(vit, config)
        lower.model.to_empty(device=device)
        half = ClientHalf(lower, config, codec, num_classes, device, precision)
        for name, module in with_weights(modules_of(lower.model, codec)).items():
            path = run.weights_files[name]
            load_into(module, load_tensors(path)[0], f"{path} does not fit")
        terms = make_terms(vit.model, config, codec.text, num_classes, resolved.precision)
        hello = Hello("inference", session=server.session, terms=terms)
        weights = sum(value.numel() * value.element_size() for value in vit.model.state_dict().values())
        largest = Ledger(vit, config, codec, num_classes).largest_frame(config.batch_size)
        certs = None if server.certs is None else Path(server.certs)
        endpoint = make_endpoint(server.address, certs, server.name, plaintext=True)  # as the run was
        self._connection = Connection(endpoint, lambda: hello, max_body=weights + (1 << 20) + largest)
        self._link = NetworkLink(self._connection)
        super().__init__(half, self._link.exchange)
        try:
            self._connection.open()
        except BaseException:
            self._connection.close()
            raise

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, C)."""
        return super().forward(images)

    def server_half(self) -> dict[str, Tensor]:
        """The server half's best weights, by their names in the whole model.

        Raises:
            Refused: where the server does not release them.
        """
        return weights_of(self._link.exchange(control(Kind.GET_WEIGHTS, {})))

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def fetch_server_half(path: Path) -> dict[str, Tensor]:
    """The server half of the run of `snello join` in a folder, from its server."""
    model = JoinedModel(RunFolder(path), torch.device("cpu"), "fp32")
    try:
        return model.server_half()
    finally:
        model.close()
