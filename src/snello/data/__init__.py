"""Pictures: found in folders, tables and data sets, or shipped with snello, checked, and split.

`snello.loading` makes batches of them.
"""

from snello.data.balance import imbalance
from snello.data.folders import find_pictures
from snello.data.reading import EXTENSIONS, decode_picture, open_picture
from snello.data.sets import ArrayPictures, FilePictures, PictureSet, Splits
from snello.data.shipped import FASHION_CLASSES
from snello.data.splits import find_source, load_pictures, load_splits, splits_of
from snello.seeds import mix, permutation

__all__ = [
    "EXTENSIONS",
    "FASHION_CLASSES",
    "ArrayPictures",
    "FilePictures",
    "PictureSet",
    "Splits",
    "decode_picture",
    "find_pictures",
    "find_source",
    "imbalance",
    "load_pictures",
    "load_splits",
    "mix",
    "open_picture",
    "permutation",
    "splits_of",
]
