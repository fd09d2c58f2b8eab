"""Markdown from result files: the table of all results, and the part of a README made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from . import workloads
from .implementations import IMPLEMENTATIONS, OPTIMIZERS
from .results import Results, Row, in_order
from .runner import FRESH, HOT, LOOP

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = "pyoptim"
BASELINES = (
    *("torch-fused", "torch-foreach", "torch-for-loop", "torch-compiled", "authors-expectigrad"),
    *("authors-adamp", "without-projection"),
)  # fmt: skip
# The float32 steps beside a step of mixed dtypes.
FLOAT32_BASELINES = ("torch-fused-float32", "pyoptim-float32")
LEGEND = (
    "Medians of interleaved repetitions; thread CPU time with one thread, wall time with several. "
    "GB/s counts each input read once and each output written once. *Of the loop*: speed relative "
    "to a loop with the same reads and writes and next to no arithmetic. *x ...*: how many times "
    "faster this step of pyoptim is, the median of the ratios per repetition."
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and whose other columns are right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def full_report(results: Results) -> str:
    """Everything: machine, speed by workload, host cost, memory, compile time, what was skipped."""
    parts = [
        runs(results),
        LEGEND,
        *_speed_sections(results),
        _host_section(results),
        _memory_section(results),
        _compile_section(results),
        skipped_section(results),
    ]
    return "\n\n".join(part for part in parts if part)


def readme_section(results: Results) -> str:
    """The part that a README shows: machine, speed by workload, host cost."""
    full = "The other types are in what `python -m pyoptim bench --table FILE` prints."
    parts = [runs(results), LEGEND, *_speed_sections(results)]
    if host := _host_section(results, ("float32",)):
        parts += [host, full]
    return "\n\n".join(part for part in parts if part)


def replace_section(text: str, section: str) -> str:
    """Put `section` between the two markers of `text`.

    Raises: ValueError unless each marker is there once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one {BEGIN} and after it one {END}")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def write_readme(path: Path, results: Results) -> None:
    try:
        text = replace_section(path.read_text(), readme_section(results))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    path.write_text(text)


def runs(results: Results) -> str:
    """One line per machine and command."""
    lines = dict.fromkeys(_run(run) for run in results.runs)
    return "\n".join(lines)


def _run(run: Row) -> str:
    machine, versions = run["machine"], run["versions"]
    cache = machine["last_level_cache_bytes"]
    cache_text = f", {cache >> 20} MiB last-level cache" if cache else ""
    return (
        f"{_gpu(machine)}{machine['cpu']}, {machine['cores']} cores{cache_text}, "
        f"torch {versions['torch']}, Python {versions['python']}, pyoptim {versions['pyoptim']}, "
        f"load average {machine['load_average'][0]:.1f} at the start, {machine['date'][:10]}.  \n"
        f"`{run['command']}`"
    )


def _gpu(machine: Row) -> str:
    """Files from before there were GPU engines have no such entry."""
    found = machine.get("gpu")
    if found is None:
        return ""
    return f"{found['name']}, {found['memory_bytes'] >> 30} GiB, with "


def _speed_sections(results: Results) -> list[str]:
    """One table per workload; a cell holds one value per thread count."""
    names = in_order((row["workload"] for row in results.rows), workloads.WORKLOADS)
    shown = [name for name in names if not workloads.parse(name).is_host_bound]
    return [
        _speed_section(results, name)
        for name in shown
        if results.find(workload=name, implementation=OURS)
    ]


def _speed_section(results: Results, workload: str) -> str:
    ours = results.find(workload=workload, implementation=OURS)
    threads = sorted({row["threads"] for row in ours})
    per_thread = " / ".join(map(str, threads))
    measured = {name for row in ours for name in row["speedup_over"]}
    baselines = [name for name in BASELINES + FLOAT32_BASELINES if name in measured]
    header = ["optimizer, dtype", "ms", "GB/s", "of the loop", *(f"x {name}" for name in baselines)]
    lines = []
    for optimizer, dtypes in _optimizers_and_dtypes(ours):
        found = {
            row["threads"]: row
            for row in ours
            if (row["optimizer"], row["dtypes"]) == (optimizer, dtypes)
        }
        rows = [found.get(count) for count in threads]
        lines.append([f"{optimizer}, {dtypes}", *_speed_cells(rows, baselines)])
    title = f"**{workloads.parse(workload).title}**, threads: {per_thread}"
    return f"{title}\n\n{markdown_table(header, lines)}"


def _optimizers_and_dtypes(rows: list[Row]) -> list[tuple[str, str]]:
    optimizers = in_order((row["optimizer"] for row in rows), OPTIMIZERS)
    dtypes = dict.fromkeys(row["dtypes"] for row in rows)
    pairs = {(row["optimizer"], row["dtypes"]) for row in rows}
    return [(a, b) for b in dtypes for a in optimizers if (a, b) in pairs]


def _speed_cells(rows: Sequence[Row | None], baselines: Sequence[str]) -> list[str]:
    def cell(read: Callable[[Row], str | None]) -> str:
        values = [read(row) if row else None for row in rows]
        return " / ".join(value or "-" for value in values) if any(values) else "-"

    return [
        cell(lambda row: f"{seconds(row) * 1e3:.3g}"),
        cell(lambda row: f"{row['gb_per_second']:.1f}"),
        cell(lambda row: _percent(row["share_of_loop"])),
        *(cell(partial(speedup_text, baseline=name)) for name in baselines),
    ]


def seconds(row: Row) -> float:
    """Median seconds of a step: thread CPU time with one thread, wall time with several."""
    clock = row["cpu_seconds"] or row["wall_seconds"]
    return float(clock["median"])


def speedup_text(row: Row, baseline: str) -> str | None:
    ratio = row["speedup_over"].get(baseline)
    return None if ratio is None else significant(ratio["median"])


def significant(value: float) -> str:
    """Two decimals below 10, one below 100, none above: what the noise leaves meaningful."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _percent(ratio: Row | None) -> str | None:
    return f"{ratio['median']:.0%}" if ratio else None


def _host_section(results: Results, dtypes: Sequence[str] | None = None) -> str:
    """Nanoseconds per tensor where the host, not the memory, is measured; one thread.

    Args:
        dtypes: those to show, None for all.
    """
    rows = [row for row in results.rows if workloads.parse(row["workload"]).is_host_bound]
    rows = [row for row in rows if row["threads"] == 1]
    rows = [row for row in rows if dtypes is None or row["dtypes"] in dtypes]
    if not rows:
        return ""
    names = in_order((row["implementation"] for row in rows), [OURS, *BASELINES])
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["optimizer"], row["dtypes"], row["workload"], row["grads"])
        cells.setdefault(key, {})[row["implementation"]] = f"{row['ns_per_tensor']:,.0f}"
    lines = [
        [f"{optimizer}, {dtypes}", workload, grads, *(found.get(name, "-") for name in names)]
        for (optimizer, dtypes, workload, grads), found in cells.items()
    ]
    title = (
        "**Host cost, ns per tensor, 1 thread**: `tiny` is 1000 tensors of 16, `one` is one tensor "
        f"of one element; {HOT}: gradients left in place, {FRESH}: made by backward before the step"
    )
    return f"{title}\n\n{markdown_table(['optimizer, dtype', 'workload', 'grads', *names], lines)}"


def _memory_section(results: Results) -> str:
    """State and temporaries; of the thread counts only the first, for they do not differ."""
    rows = [row for row in results.rows if row["grads"] == HOT and row["implementation"] != LOOP]
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["workload"] in ("large", "transformer"):
            key = (row["optimizer"], row["dtypes"], row["workload"], row["implementation"])
            found.setdefault(key, row)
    lines = [
        [*key, megabytes(row["state_bytes"]), megabytes(row["temporary_bytes"])]
        for key, row in found.items()
        if key[-1] in IMPLEMENTATIONS
    ]
    header = ["optimizer", "dtype", "workload", "implementation", "state MB", "temporary MB"]
    return f"**Memory of a step**\n\n{markdown_table(header, lines)}" if lines else ""


def megabytes(value: int | None) -> str:
    """One decimal, as the tables of memory show it."""
    return "not known" if value is None else f"{value / 1e6:,.1f}"


def _compile_section(results: Results) -> str:
    rows = [row for row in results.rows if row.get("compile_seconds") is not None]
    lines = [
        [
            row["optimizer"],
            row["dtypes"],
            row["workload"],
            str(row["threads"]),
            f"{row['compile_seconds']:.1f}",
        ]
        for row in rows
    ]
    header = ["optimizer", "dtype", "workload", "threads", "seconds to compile"]
    return f"**torch.compile**\n\n{markdown_table(header, lines)}" if lines else ""


def skipped_section(results: Results) -> str:
    """Reasons why combinations were not measured."""
    reasons = dict.fromkeys(f"{row['implementation']}: {row['reason']}" for row in results.skipped)
    return "**Not measured**\n\n" + "\n".join(f"- {line}" for line in reasons) if reasons else ""
