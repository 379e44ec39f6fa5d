"""ONNX: one file that onnxruntime and others run, without dropping tokens, on batches of any size.

Written by PyTorch's exporter (torch.export and onnxscript), then run by onnxruntime against the model itself.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snello.errors import ConfigError, ModelError, one_line
from snello.export.trained import METADATA, Trained
from snello.vit import logits_of

BATCH = 2
"""Pictures that the exporter traces with: it would take 0 and 1 for constants."""
CHECKED = (1, 5)
"""Batches that are compared, neither of them the exporter's."""
TOLERANCE = 1e-4
"""By how much a logit may be another, in fp32."""


def require_packages() -> None:
    """Raises a ConfigError with the pip command where a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}: pip install 'snello[onnx]'") from error


def write(trained: Trained, path: Path) -> None:
    """Writes the file (beside it PATH.data where the weights exceed what a file of ONNX can hold) and checks it.

    Raises:
        ModelError: where the model cannot be exported, or onnxruntime computes something else than the model.
    """
    model = _Logits(trained.build())
    size = trained.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                (torch.randn(BATCH, 3, size, size, generator=generator),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except Exception as error:  # tracing, decomposing, translating: each raises its own
        raise ModelError(f"{trained.settings.model} could not be exported to ONNX: {one_line(error)}") from error
    program.model.metadata_props[METADATA] = json.dumps(trained.about())
    program.save(path, external_data=False)
    _check(path, model, [torch.randn(num, 3, size, size, generator=generator) for num in CHECKED])


def line(trained: Trained, path: str) -> str:
    """The line of Python that loads the file with onnxruntime."""
    return f"import onnxruntime; model = onnxruntime.InferenceSession({path!r})"


def code(trained: Trained, path: str) -> list[str]:
    """Lines of Python that classify a picture with onnxruntime, NumPy and Pillow alone."""
    text = f"""import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession({path!r})
about = json.loads(session.get_modelmeta().custom_metadata_map[{METADATA!r}])
image = Image.open("picture.jpg").convert("RGB")
short, side = min(image.size), about["image_size"]
resized = [about["resize"] * length // short for length in image.size]
image = image.resize(resized, Image.Resampling[about["interpolation"].upper()])
left, top = (round((length - side) / 2) for length in image.size)
pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
(logits,) = session.run(["logits"], {{"images": pixels.transpose(2, 0, 1)[None]}})
print(about["classes"][int(logits.argmax(1)[0])])"""
    return [text]


class _Logits(nn.Module):
    """A model of either library, from pictures (B, 3, H, W) to logits (B, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


@torch.no_grad()
def _check(path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = [np.asarray(session.run(["logits"], {"images": images.numpy()})[0]) for images in batches]
    except Exception as error:  # onnxruntime's own, which have no common class
        raise ModelError(f"onnxruntime cannot run the ONNX file: {one_line(error)}; nothing was written") from error
    for images, logits in zip(batches, found, strict=True):
        apart = float((torch.from_numpy(logits) - model(images)).abs().max())
        if not apart <= TOLERANCE:  # nor NaN
            raise ModelError(
                f"the ONNX file does not compute what the model does: on a batch of {len(images)} the logits are "
                f"up to {apart:.2g} apart, more than {TOLERANCE:g}; nothing was written"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter without what it says to its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
