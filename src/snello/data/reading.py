"""Reading one picture, from a file or from bytes: 8-bit RGB, whatever it was, or one line that says why not."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from snello.errors import DataError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
UNREADABLE = "cannot be read as a picture"


def open_picture(path: Path, *, draft: bool = False) -> Image.Image:
    """The picture in a file as 8-bit RGB, turned as its EXIF tag says, transparent parts on white.

    Args:
        path: The file; its contents decide the format, not its name.
        draft: Decode a JPEG at an eighth of its size, which is enough to find out whether it can be read.

    Raises:
        DataError: naming the file and the reason, where it cannot be read.
    """
    return _decode(path, printable(path), draft)


def decode_picture(data: bytes, name: str, *, draft: bool = False) -> Image.Image:
    """The picture in the bytes of a file, as `open_picture` gives it; `name` is what messages call it.

    Raises:
        DataError: naming the picture and the reason, where it cannot be read.
    """
    return _decode(data, name, draft)


def _decode(source: Path | bytes, name: str, draft: bool) -> Image.Image:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if draft:
                image.draft(None, (1, 1))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises almost anything: OSError, SyntaxError, struct.error...
        raise DataError(f"{name}: {UNREADABLE}: {_reason(source, error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip at 255 what goes up to 65535
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _reason(source: Path | bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        return "not a known picture format" if size else "the file is empty"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
