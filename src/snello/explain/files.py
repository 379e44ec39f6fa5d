"""A part of a report as files: values as JSON, and pictures as JPEG."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from snello.errors import CheckpointError
from snello.files import replacing

QUALITY = 85
SEEN, THUMBNAIL = 224, 96
"""Most pixels along a side: of a picture as the model sees it, and of a small copy."""


@dataclass(frozen=True)
class Part:
    """What is known of something: values, and the pictures that they name."""

    values: Mapping[str, Any]
    images: Mapping[str, bytes] = field(default_factory=dict)
    """JPEG files by their paths within the report's folder."""

    def write(self, folder: Path, name: str) -> None:
        """Writes the pictures, and then `name`.json, which is there only where all pictures are.

        Raises:
            CheckpointError: where it cannot be written.
        """
        file = folder / f"{name}.json"
        try:
            for path, image in self.images.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(image)
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not write {folder}: {error.strerror or error}") from error
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(self.values, separators=(",", ":")) + "\n", encoding="utf-8")


def seen(image: Image.Image) -> bytes:
    """A picture as the model sees it, large ones made smaller."""
    image.thumbnail((SEEN, SEEN), Image.Resampling.LANCZOS)
    return _jpeg(image)


def thumbnail(image: Image.Image) -> bytes:
    """The square in the middle of a picture, made small."""
    side = min(THUMBNAIL, *image.size)
    return _jpeg(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Of a small picture with half the colours little would be left.
    image.convert("RGB").save(file, "JPEG", quality=QUALITY, subsampling=0 if max(image.size) < SEEN else 2)
    return file.getvalue()
