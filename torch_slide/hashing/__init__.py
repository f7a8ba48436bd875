"""Hash families behind one interface and one registry, and the transform that comes before any of them.

A new family is a file here with one subclass of :class:`HashFamily` under :func:`register`.
"""

from torch_slide.hashing.family import FAMILIES, HashFamily, RowSource, hash_family, register
from torch_slide.hashing.kmeans import KMeans
from torch_slide.hashing.simhash import SimHash
from torch_slide.hashing.transform import augment_queries, augment_rows, row_norms
from torch_slide.hashing.winners import DWTA, WTA, MinHash

__all__ = [
    "DWTA",
    "FAMILIES",
    "WTA",
    "HashFamily",
    "KMeans",
    "MinHash",
    "RowSource",
    "SimHash",
    "augment_queries",
    "augment_rows",
    "hash_family",
    "register",
    "row_norms",
]
