"""Reading one picture, from a file or from bytes: 8-bit RGB, whatever it was, or one line that says why not."""

import contextlib
import importlib
import io
import mimetypes
import os
import stat
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from snello.errors import DataError, printable

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2", ".heic", ".heif",
)  # fmt: skip
"""Names that say what a file is, where its format can be read here; of other files the contents decide."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
"""What Pillow calls the formats of files that are found by their contents."""
UNREADABLE = "cannot be read as a picture"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def open_picture(source: Path | bytes, name: str = "", *, draft: bool = False) -> Image.Image:
    """Reads a picture as 8-bit RGB, turned as its EXIF tag says, transparent parts on white.

    Args:
        source: The file, or its bytes; the contents decide the format.
        name: What messages call it; default: the path.
        draft: Decode a JPEG at an eighth of its size, which is enough to find out whether it can be read.

    Raises:
        DataError: naming the picture and the reason, where it cannot be read.
    """
    try:
        _formats()
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # a pipe would wait for ever
            raise ValueError("not a regular file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if draft:
                image.draft(None, (1, 1))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises almost anything: OSError, SyntaxError, struct.error...
        raise DataError(f"{name or printable(str(source))}: {UNREADABLE}: {_reason(source, error)}") from None


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
        head = source[:12] if isinstance(source, bytes) else _head(source)
        if advice := _advice(head):
            return f"its format is not read here: {advice}"
        return "not a known picture format" if head else "the file is empty"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@cache
def _formats() -> list[str]:
    """Returns those of `FORMATS` that can be read here: by Pillow, and by pillow-heif where that is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return sorted(set(FORMATS) & set(Image.registered_extensions().values()))


@cache
def _kinds() -> dict[str, str]:
    """Returns what kind of file an extension stands for: `picture` where it can be read here, else a MIME type."""
    kinds = dict.fromkeys(Image.registered_extensions(), "image/other") | mimetypes.MimeTypes().types_map[True]
    readable = {ext for ext, name in Image.registered_extensions().items() if name in _formats()}
    return kinds | dict.fromkeys(readable.intersection(EXTENSIONS), "picture")


def extension_of(name: str) -> str:
    """Returns the extension in lower case, as .jpg."""
    return os.path.splitext(name)[1].lower()


def has_picture_name(name: str) -> bool:
    """Says whether a file's extension is that of a picture, of a format that can be read here."""
    return _kinds().get(extension_of(name)) == "picture"


def reason_against(path: str) -> str | None:
    """Says why a regular file is no picture that can be read here; None where it is one, perhaps a damaged one.

    Known extensions decide; files with others are opened.
    """
    extension = extension_of(path)
    kind = _kinds().get(extension, "application/octet-stream")
    if kind == "picture":
        return None
    if not kind.startswith("image/") and kind != "application/octet-stream":
        return "not pictures"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                raw = image.format == "TIFF" and extension  # what opens is often a small preview
        return "camera raw or another kind of TIFF; convert them, or name them .tif" if raw else None
    except Image.DecompressionBombError:
        return None
    except Exception as error:  # as in `open_picture`
        if isinstance(error, OSError) and error.errno:
            return error.strerror
    if advice := _advice(_head(Path(path))):
        return advice
    return "not read; save them as PNG or JPEG" if kind.startswith("image/") else "not pictures"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(12)


def _advice(head: bytes) -> str | None:
    """Says what would make a file readable that begins so, where something would."""
    if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS and "HEIF" not in _formats():
        return "pip install pillow-heif"
    if head[4:8] == b"ftyp" and head[8:] in (b"avif", b"avis") and "AVIF" not in _formats():
        return "pip install --upgrade pillow"
    return None
