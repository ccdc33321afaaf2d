"""Packed data: a data set in a few large files, written by `src/pack.py` and read by `data=packed`.

A pack is a folder:

    manifest.json          options, classes, and size and checksum of every file; written last, so a folder without it
                           is unfinished
    begun.json             description of an unfinished pack
    skipped.txt            images that could not be read, if any
    train/00000.bin ...    the images, one after another: encoded files, or pixels (H, W, 3) uint8
    train/00000.npz ...    in an unfinished pack: what the finished data file of this number contains
    train/label.npy ...    columns of the table of images (`vitrail.data.sources.tables`)
    val/...                the same for the validation split
"""

from vitrail.data.sources.packed.options import PackOptions
from vitrail.data.sources.packed.reader import Packed, PackedSplit
from vitrail.data.sources.packed.writer import PackWriter

__all__ = ["PackOptions", "PackWriter", "Packed", "PackedSplit"]
