"""Coresets: which samples to keep, what they weigh, and training with their weights; exact search.

The results of this package are functions of the values alone: they do not depend on the number of
threads, on the instruction set, on memory layout or on how the data are cut into chunks.
"""

from pyoptim.coreset.broadcast import broadcast_weights
from pyoptim.coreset.centers import CenterDistances, center_distances, class_medians
from pyoptim.coreset.cwerm import CWERM, CWERMResult
from pyoptim.coreset.distance import nearest, nearest_reference, pairwise_sqdist
from pyoptim.coreset.features import Features, extract_features
from pyoptim.coreset.gradients import craig, facility_location, glister, gradmatch
from pyoptim.coreset.greedy import herding, k_center_greedy
from pyoptim.coreset.head import LinearHead
from pyoptim.coreset.methods import METHODS, select
from pyoptim.coreset.moderate import moderate, moderate_scores
from pyoptim.coreset.scores import (
    ForgettingCounter,
    by_score,
    el2n,
    el2n_scores,
    forgetting,
    grand,
    grand_scores,
    random,
    uncertainty,
    uncertainty_scores,
)
from pyoptim.coreset.selection import Selection
from pyoptim.coreset.sharded import (
    broadcast_weights_sharded,
    nearest_sharded,
    select_sharded,
)
from pyoptim.coreset.training import Training, learn_weights, train_weighted

__all__ = [
    "CWERM",
    "METHODS",
    "CWERMResult",
    "CenterDistances",
    "Features",
    "ForgettingCounter",
    "LinearHead",
    "Selection",
    "Training",
    "broadcast_weights",
    "broadcast_weights_sharded",
    "by_score",
    "center_distances",
    "class_medians",
    "craig",
    "el2n",
    "el2n_scores",
    "extract_features",
    "facility_location",
    "forgetting",
    "glister",
    "gradmatch",
    "grand",
    "grand_scores",
    "herding",
    "k_center_greedy",
    "learn_weights",
    "moderate",
    "moderate_scores",
    "nearest",
    "nearest_reference",
    "nearest_sharded",
    "pairwise_sqdist",
    "random",
    "select",
    "select_sharded",
    "train_weighted",
    "uncertainty",
    "uncertainty_scores",
]
