"""Distances to centres: one step of k-center, class medians, distances to the own class's centre.

Distances are float64 sums of squared differences of the given values, in one fixed order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyoptim.coreset.engines import CudaEngine, engine_for
from pyoptim.coreset.matrices import (
    as_tensor,
    check_matrix,
    check_no_nan,
    kernels_for,
    nan_error,
    row_major,
    spans,
)
from pyoptim.coreset.search import dense_rows

if TYPE_CHECKING:
    from pyoptim.coreset.matrices import Array

# Elements of the reference's float64 differences.
_REFERENCE_ELEMENTS = 1 << 22


class CenterDistances:
    """The distance of every row to the nearest of a growing set of centres.

    One step of k-center greedy (Sener and Savarese, arXiv:1708.00489, Algorithm 1) is one `add`:
    one read of the features.

        distances = CenterDistances(features)
        farthest, _ = distances.add(0)
        for _ in range(budget - 1):
            farthest, _ = distances.add(farthest)

    On a GPU too a step is one read of the features. The host waits once, for its result.

    Args:
        x: features [n, d]: float32, float64, bfloat16 or float16 tensor or numpy array, which must
            not change while this object is in use. Copied once if its rows are not dense.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None is what
            `pyoptim.use_backend` chose.

    Attributes:
        sqdist: [n] float64, squared distances to the nearest centre; infinite before the first.

    Raises: ValueError for another shape; TypeError for another dtype; BackendError.
    """

    def __init__(self, x: Tensor | Array, *, backend: str | None = None) -> None:
        self._x = check_matrix(as_tensor(x, "x"), "x")
        engine = engine_for(self._x, backend)
        self._native = None if engine is not None else kernels_for(self._x, backend)
        if engine is not None:
            self._x = dense_rows(self._x)
            self._device_step = _DeviceStep(engine, self._x)
        elif self._native is not None:
            self._x = row_major(self._x)
        self._engine = engine
        self._is_checked = False
        self.sqdist = self._unknown()

    def _unknown(self) -> Tensor:
        return torch.full((len(self._x),), torch.inf, dtype=torch.float64, device=self._x.device)

    @torch.no_grad()
    def add(self, center: int | Tensor) -> tuple[int, float]:
        """Adds a centre, and returns the row that is now farthest from all, with its distance.

        Args:
            center: the number of a row of x, or a vector [d] of any real dtype.

        Returns:
            (row, squared distance); of several farthest rows the lowest. (-1, 0.0) without rows.

        Raises:
            IndexError: there is no such row.
            ValueError: a vector of another shape, or one with NaN or infinities; a row with NaN.
                Nothing has changed then.
        """
        is_farthest = self._engine is not None and self._device_step.is_farthest(center)
        values = None if is_farthest else self._center(center)
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"center={center!r} has NaN or infinite elements; give finite ones")
        if len(self._x) == 0:
            return -1, 0.0
        row, sqdist, nan_row = self._step(values)
        if nan_row >= 0:
            # Only the first centre can find one: finite rows are at a distance from every other.
            self.sqdist = self._unknown()
            raise nan_error("x", nan_row)
        self._is_checked = True
        return row, sqdist

    def _center(self, center: int | Tensor) -> Tensor:
        n, d = self._x.shape
        if isinstance(center, Tensor) and center.ndim == 1:
            if len(center) != d or center.is_complex():
                raise ValueError(
                    f"center has shape {tuple(center.shape)} and dtype {center.dtype}; "
                    f"give a real vector of {d} elements"
                )
            return center.detach().to(self._x.device, torch.float64).contiguous()
        row = int(center)
        if not 0 <= row < n:
            raise IndexError(f"center={row} is not a row of x, which has {n}")
        return self._x[row].double().contiguous()

    def _step(self, center: Tensor | None) -> tuple[int, float, int]:
        if self._engine is not None:
            return self._device_step.run(center, self.sqdist)
        assert center is not None
        if self._native is not None:
            row, sqdist, nan_row = self._native.coreset_step_center(self._x, center, self.sqdist)
            return int(row), float(sqdist), int(nan_row)
        distances = torch.cat([_sqdist(self._x[part], center) for part in _parts(self._x)])
        bad = distances.isnan()
        if bool(bad.any()):
            return -1, 0.0, int(bad.int().argmax())
        torch.minimum(self.sqdist, distances, out=self.sqdist)
        row = int((self.sqdist == self.sqdist.max()).int().argmax())
        return row, float(self.sqdist[row]), -1


class _DeviceStep:
    """Steps of an engine that reads the farthest row, once it has found it, where it left it."""

    # Farthest and kFarthestParts in csrc/cuda/api.hpp.
    PARTS, BYTES = 2048, 24

    def __init__(self, engine: CudaEngine, x: Tensor) -> None:
        self.engine, self.x = engine, x
        self.partials = torch.empty(self.PARTS * self.BYTES, dtype=torch.uint8, device=x.device)
        self.found = torch.empty(self.BYTES, dtype=torch.uint8, device=x.device)
        self.row = -1

    def is_farthest(self, center: int | Tensor) -> bool:
        is_vector = isinstance(center, Tensor) and center.ndim == 1
        return not is_vector and self.row >= 0 and int(center) == self.row

    def run(self, center: Tensor | None, sqdist: Tensor) -> tuple[int, float, int]:
        """A step to a centre, or to the row that the last step has found."""
        self.engine.step_center(self.x, center, sqdist, self.partials, self.found)
        found = self.found.cpu()
        largest = float(found[:8].view(torch.float64))
        row, nan_row = found[8:].view(torch.int64).tolist()
        # Of an infinite distance the row may be infinite, which a centre must not be.
        self.row = row if math.isfinite(largest) and nan_row < 0 else -1
        return row, largest, nan_row


def _sqdist(x: Tensor, center: Tensor) -> Tensor:
    return (x.double() - center).square_().sum(dim=1)


def _parts(x: Tensor) -> Iterator[slice]:
    return spans(len(x), _REFERENCE_ELEMENTS // max(1, x.shape[1]))


@torch.no_grad()
def class_medians(
    x: Tensor | Array,
    labels: Tensor,
    n_classes: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The median of every feature over the rows of each class.

    By selection, exact: of an even number of rows the mean of the two middle values, as numpy's
    median (torch's takes the lower one). These are the class centres of the moderate coreset (Xia
    et al., ICLR 2023, section 3).

    On a GPU by torch.sort of a block of columns of one class at a time.

    Args:
        x: features [n, d]: float32, float64, bfloat16 or float16 tensor or numpy array.
        labels: integers [n] from 0 to n_classes - 1.
        n_classes: None: the largest label + 1.
        backend: as in `CenterDistances`.

    Returns:
        [n_classes, d] float32, or float64 for float64 features; NaN for classes without rows.

    Raises: ValueError for shapes, labels out of range, and a NaN (the message names the row).
    """
    features = check_matrix(as_tensor(x, "x"), "x")
    classes, n_classes = _checked_labels(labels, features, n_classes)
    order = _narrow(classes, n_classes).argsort(stable=True)
    counts = classes.bincount(minlength=n_classes)
    out = torch.empty((n_classes, features.shape[1]), dtype=torch.float64, device=features.device)
    engine = engine_for(features, backend)
    native = None if engine is not None else kernels_for(features, backend)
    if native is not None:
        bad = native.coreset_medians(row_major(features), order, counts.cumsum(0), out)
        if bad >= 0:
            raise nan_error("x", bad)
    else:
        check_no_nan(features, "x")
        ends = counts.cumsum(0).tolist()
        for c, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            rows = order[start:end].to(features.device)
            for part in spans(features.shape[1], _REFERENCE_ELEMENTS // max(1, len(rows))):
                out[c, part] = _plain_median(features[:, part][rows])
    return out.to(torch.promote_types(features.dtype, torch.float32))


def _narrow(classes: Tensor, n_classes: int) -> Tensor:
    """In the smallest dtype that holds them: torch sorts bytes in a quarter of the time."""
    return classes.to(torch.uint8 if n_classes <= 256 else torch.int32)


def _plain_median(x: Tensor) -> Tensor:
    """Of every column, float64. Sorted as it is: a wide copy takes twice the memory or more."""
    n = len(x)
    if n == 0:
        return torch.full((x.shape[1],), torch.nan, dtype=torch.float64, device=x.device)
    ordered = x.sort(dim=0).values
    low, high = ordered[(n - 1) // 2].double(), ordered[n // 2].double()
    # The sum of two large values may be infinite.
    middle = torch.where((low + high).isinf(), low * 0.5 + high * 0.5, (low + high) * 0.5)
    return middle if n % 2 == 0 else high


@torch.no_grad()
def center_distances(
    x: Tensor | Array, labels: Tensor, centers: Tensor, *, backend: str | None = None
) -> Tensor:
    """The Euclidean distance of every row to the centre of its class.

    Args:
        x: features [n, d]: float32, float64, bfloat16 or float16 tensor or numpy array.
        labels: integers [n], rows of `centers`.
        centers: [n_classes, d], real.
        backend: as in `CenterDistances`.

    Returns:
        [n] float64: the root of the float64 sum of squared differences. NaN where a value is NaN.

    Raises: ValueError for shapes and labels that do not fit; TypeError for dtypes.
    """
    features = check_matrix(as_tensor(x, "x"), "x")
    check_matrix(centers, "centers")
    if centers.shape[1] != features.shape[1] or centers.is_complex():
        raise ValueError(
            f"centers has shape {tuple(centers.shape)} and dtype {centers.dtype} but x has shape "
            f"{tuple(features.shape)}; give real rows of {features.shape[1]} elements"
        )
    classes, n_classes = _checked_labels(labels, features, len(centers))
    wide = centers.detach().to(features.device, torch.float64).contiguous()
    if (engine := engine_for(features, backend)) is not None:
        rows = classes.to(features.device)
        return engine.center_sqdist(dense_rows(features), rows, wide).sqrt_()
    out = torch.empty(len(features), dtype=torch.float64, device=features.device)
    if (native := kernels_for(features, backend)) is not None:
        native.coreset_center_sqdist(row_major(features), classes, wide, n_classes, out)
        return out.sqrt_()
    classes = classes.to(features.device)
    for part in _parts(features):
        out[part] = _sqdist(features[part], wide[classes[part]])
    return out.sqrt_()


def _checked_labels(labels: Tensor, x: Tensor, n_classes: int | None) -> tuple[Tensor, int]:
    """int64 labels on the CPU, and the number of classes."""
    labels = torch.as_tensor(labels)
    is_integer = not (labels.is_floating_point() or labels.is_complex())
    if labels.shape != (len(x),) or not is_integer:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; "
            f"give {len(x)} integers, one per row of x"
        )
    labels = labels.cpu().long().contiguous()
    if n_classes is None:
        n_classes = int(labels.max()) + 1 if len(labels) else 0
    bad = (labels < 0) | (labels >= n_classes)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"labels[{row}] is {int(labels[row])}; labels must be from 0 to {n_classes - 1}"
        )
    return labels, n_classes
