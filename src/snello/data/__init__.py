"""Labelled pictures: from what `--data` names to batches. Nothing is downloaded.

In the order to read:

reading           one picture: from a file or bytes to 8-bit RGB; which files are pictures, and why others are not
sets              labelled pictures, in files or in an array, and their balance; `Splits`, the pictures of a run
source            what every source of pictures answers
folders           a folder of class folders, or of train, val and test
tables            CSV, TSV and Parquet
hf_datasets       Hugging Face datasets
torchvision_sets  torchvision's data sets by name
shipped           the 2 500 pictures that ship with snello
splits            from the text of `--data` to a source, and to what is trained on and what is held out
checking          which pictures cannot be read
examining         `snello check-data`
loaders           augmentation, the order of the samples, batches
"""

from snello.data.folders import find_pictures
from snello.data.reading import EXTENSIONS, open_picture
from snello.data.sets import ArrayPictures, FilePictures, PictureSet, Splits, imbalance, typical_size
from snello.data.shipped import FASHION_CLASSES
from snello.data.splits import find_source, load_pictures, splits_of

__all__ = [
    "EXTENSIONS", "FASHION_CLASSES", "ArrayPictures", "FilePictures", "PictureSet", "Splits", "find_pictures",
    "find_source", "imbalance", "load_pictures", "open_picture", "splits_of", "typical_size",
]  # fmt: skip
