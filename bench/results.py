"""Result files: written after every case, read back and merged by the reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import machine

Row = dict[str, Any]
KEY = ("optimizer", "dtypes", "workload", "threads", "grads", "implementation", "device")
SCHEMA = 1


@dataclass
class Results:
    """Rows of one or several runs.

    Args:
        runs: for each run: command, versions, machine.
    """

    runs: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    @classmethod
    def start(cls, command: str, device: str = "cpu") -> Results:
        run = {
            "command": command,
            "device": device,
            "versions": machine.describe_versions(),
            "machine": machine.describe_machine(),
        }
        return cls([run])

    def of_device(self, device: str) -> Results:
        """The part that was measured on one device."""
        parts = (
            [row for row in rows if row["device"] == device]
            for rows in (self.runs, self.rows, self.skipped)
        )
        return Results(*parts)

    def find(self, **wanted: object) -> list[Row]:
        """Rows whose fields equal all of `wanted`."""
        return [row for row in self.rows if all(row[key] == wanted[key] for key in wanted)]

    def save(self, path: Path) -> None:
        """Write the file in one move, so that an interrupted run leaves a whole one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **vars(self)}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def load(paths: Sequence[Path]) -> Results:
    """Merge result files; a row of a later file replaces the same row of an earlier one.

    Raises: ValueError for a file that is not a result of this version.
    """
    merged = Results()
    rows: dict[tuple[object, ...], Row] = {}
    for path in paths:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{path}: not a benchmark result with schema {SCHEMA}")
        # Files from before there was a choice of device are of the CPU.
        for row in content["runs"] + content["skipped"] + content["rows"]:
            row.setdefault("device", "cpu")
        merged.runs += content["runs"]
        merged.skipped += content["skipped"]
        rows |= {tuple(row[name] for name in KEY): row for row in content["rows"]}
    merged.rows = list(rows.values())
    return merged


def in_order(values: Iterable[str], order: Iterable[str]) -> list[str]:
    """Distinct `values`: those named in `order` first and in that order, then the others."""
    found = dict.fromkeys(values)
    known = [name for name in order if name in found]
    return known + [name for name in found if name not in known]
