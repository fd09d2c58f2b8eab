"""Coresets: exact nearest-neighbour search, k-center steps and class centres.

The results of this package are functions of the values alone: they do not depend on the number of
threads, on the instruction set, on memory layout or on how the data are cut into chunks.
"""

from pyoptim.coreset.centers import CenterDistances, center_distances, class_medians
from pyoptim.coreset.distance import nearest, nearest_reference, pairwise_sqdist

__all__ = [
    "CenterDistances",
    "center_distances",
    "class_medians",
    "nearest",
    "nearest_reference",
    "pairwise_sqdist",
]
