"""What ALaST makes of one picture, to be looked at: `ALaST.show`."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from snello.drawing.tokens import token_svg
from snello.errors import require
from snello.vit.trace import grid_of, trace

if TYPE_CHECKING:
    from snello.methods.alast import ALaST

SIZE = 224
"""Width of a frame in pixels, and most that the picture in it has."""
USUAL = (0.5, 0.5, 0.5)
"""Mean and deviation of pictures where a model does not say."""
STYLE = "display:flex;flex-wrap:wrap;gap:16px;font:13px/1.4 system-ui,sans-serif"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ALaST: tokens of a picture</title>
<style>:root{{color-scheme:light dark}}body{{margin:24px}}</style></head>
<body>{}</body></html>
"""


@dataclass(frozen=True)
class Shown:
    """A picture, and its tokens after each block that changed something; a notebook shows it."""

    image: str
    """The picture as a data URL."""
    grid: tuple[int, int]
    frames: Sequence[tuple[str, Sequence[int]]]
    """A caption, and the token that each patch is part of, -1 where it was dropped; the first is the picture itself."""

    def __repr__(self) -> str:
        return f"Shown({'; '.join(caption for caption, _ in self.frames)})"

    def _repr_html_(self) -> str:
        """Small multiples, to stand in any page."""
        figures = (
            f'<figure style="margin:0">{token_svg(self.image, self.grid, groups, alt=caption, size=SIZE)}'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, groups in self.frames
        )
        return f'<div style="{STYLE}">{"".join(figures)}</div>'

    def save(self, path: Path | str) -> None:
        """Writes an HTML file that needs nothing else."""
        Path(path).write_text(PAGE.format(self._repr_html_()), encoding="utf-8")


def show(alast: "ALaST", image: Any) -> Shown:
    """What the blocks make of a picture by the budgets of now, as `ALaST.show` describes it."""
    x, picture = _prepared(alast, image)
    vit, target = alast.vit, alast.target
    size = None if target is None else target.num_patches
    try:
        found = trace(vit, x)
    finally:
        if target is not None and size is not None:
            target.num_patches = size  # of the pictures that are trained on
    total = found.num_patches
    frames: list[tuple[str, Sequence[int]]] = [(f"the picture: {total} tokens", range(total))]
    for block, left, groups in found.changes(0):
        frames.append((f"after block {block}: {left} of {total} tokens", groups))
    if len(frames) == 1:
        why = "no block passes on fewer" if alast.dropping else "the last steps pass on all"
        frames = [(f"the picture: {total} tokens; {why} now", range(total))]
    return Shown(_data_url(picture), grid_of(total, *x.shape[2:]), frames)


def _prepared(alast: "ALaST", image: Any) -> tuple[Tensor, Image.Image]:
    """The picture as the model gets it, (1, 3, H, W), and as it is shown."""
    vit = alast.vit
    weight = next(vit.embedding_parameters(), None)
    require(weight is not None, "show()", "on a model that sees pictures", "the upper part of one that is cut")
    assert weight is not None
    if isinstance(image, Image.Image):
        image = v2.functional.pil_to_tensor(image.convert("RGB"))
    kind = "a PIL picture, or a tensor (3, H, W) of uint8 or float"
    require(isinstance(image, Tensor), "image", kind, type(image).__name__)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    require(image.ndim == 3 and len(image) == 3, "image", kind, tuple(image.shape))
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = image.aminmax()
        pixels = ((image.float() - low) / (high - low).clamp_min(1e-12) * 255).byte()
    else:
        require(image.dtype == torch.uint8, "image", kind, image.dtype)
        pixels = _cropped(image, vit.num_patches, vit.patch_size)
        known = getattr(vit.model, "pretrained_cfg", None) or {}
        mean, std = (list(known.get(name) or USUAL) for name in ("mean", "std"))
        image = v2.functional.normalize(pixels.float() / 255, mean, std)
    x = image[None].to(weight.device, weight.dtype)
    return x, Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _cropped(image: Tensor, num_patches: int, patch_size: int) -> Tensor:
    """The square in the middle of pixels (3, H, W), of the model's own size."""
    side = math.isqrt(num_patches)
    square = "a float tensor, as the model gets it: its own pictures are not square"
    require(side**2 == num_patches, "image", square, "pixels")
    size = [side * patch_size]
    resized = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC, antialias=True)
    cropped: Tensor = v2.functional.center_crop(resized, size)
    return cropped


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
