"""A finished run of `snello join` in use: the client half from the run folder, the server half at its server."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import FinetuneConfig
from snello.config.units import is_loopback, parse_address
from snello.devices import Precision
from snello.errors import CheckpointError
from snello.files import load_tensors
from snello.runs.folder import RunFolder
from snello.split.build import cut_model, make_codec, make_half, meta_vit
from snello.split.client.connection import Connection, Endpoint
from snello.split.client.endpoints import make_endpoint
from snello.split.halves import ClientHalf
from snello.split.ledger import Ledger
from snello.split.wire.frames import Kind, control
from snello.split.wire.handshake import Hello, make_terms
from snello.split.wire.weights import weights_of


class Online(nn.Module):
    """Normalised pictures to logits, with both halves at their best epoch.

    Args:
        run: folder of the run.
        config: its settings.
        resolved: what it decided.
        device: of the client half.
        precision: of its forward passes.

    Raises:
        CheckpointError: where the weights do not fit.
        NetworkError: where the server cannot be reached.
        Refused: where it does not know the session or does not admit us.
    """

    def __init__(
        self,
        run: RunFolder,
        config: FinetuneConfig,
        resolved: dict[str, Any],
        device: torch.device,
        precision: Precision,
    ) -> None:
        super().__init__()
        num_classes = len(resolved["classes"])
        vit = meta_vit(config, num_classes, resolved.get("architecture"))
        model = vit.model
        vit.set_attention_paths([resolved["attention"]] * vit.depth)
        codec = make_codec(config, resolved["codec"], vit.embed_dim).to(device)
        lower, _ = cut_model(vit, config)
        lower.model.to_empty(device=device)
        options: dict[str, Any] = {"num_classes": num_classes, "device": device, "precision": precision}
        self._half = make_half(ClientHalf, lower, config, codec, **options)
        _load(lower.model, run.model_file)
        if next(codec.parameters(), None) is not None:
            _load(codec, run.codec_file)
        terms = make_terms(
            model,
            config,
            codec=resolved["codec"],
            num_classes=num_classes,
            precision=resolved["precision"],
        )
        server = resolved["server"]
        hello = Hello("inference", session=server["session"], terms=terms)
        weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        self._connection = Connection(_endpoint(server), lambda: hello, max_body=weights + (1 << 20))
        self._connection.max_body += Ledger(vit, config, codec, num_classes).largest_frame(config.batch_size)
        self._batch_size = config.batch_size
        try:
            self._connection.open()
        except BaseException:
            self._connection.close()
            raise

    def train(self, mode: bool = True) -> "Online":
        """It only ever evaluates."""
        super().train(mode)
        if hasattr(self, "_half"):
            self._half.train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised pictures (B, 3, H, W)."""
        self._half.train(False)
        parts = []
        for part in torch.split(images, self._batch_size):  # the server takes no more at once
            parts.append(self._half.logits(self._connection.request(self._half.evaluate(part), 0)))
        return torch.cat(parts)

    def server_half(self) -> dict[str, Tensor]:
        """The server half's best weights, by their names in the whole model.

        Raises:
            Refused: where the server does not release them.
        """
        return weights_of(self._connection.request(control(Kind.GET_WEIGHTS, {}), 0))

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def fetch_server_half(path: Path) -> dict[str, Tensor]:
    """The server half of the run of `snello join` in a folder, from its server."""
    run = RunFolder(path)
    config, resolved = run.read_config()
    online = Online(run, config, resolved, torch.device("cpu"), "fp32")
    try:
        return online.server_half()
    finally:
        online.close()


def _endpoint(server: dict[str, Any]) -> Endpoint:
    certs = None if server.get("certs") is None else Path(server["certs"])
    plaintext = certs is None and not is_loopback(parse_address(server["address"], "ADDRESS")[0])
    return make_endpoint(server["address"], certs, server.get("name"), plaintext=plaintext)


def _load(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_tensors(path)[0])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit: {' '.join(str(error).split())}") from error
