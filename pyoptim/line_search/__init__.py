"""Line searches: optimizers without a learning rate."""

from pyoptim.line_search.base import LineSearch, Search
from pyoptim.line_search.salsa import SaLSa
from pyoptim.line_search.sls import SLS, AdaSLS

__all__ = ["SLS", "AdaSLS", "LineSearch", "SaLSa", "Search"]
