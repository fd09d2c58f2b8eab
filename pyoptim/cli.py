"""The command line: `python -m pyoptim info | bench | demo`."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# Command -> (one line of help, module whose main(argv) runs it). Imported only when asked for.
COMMANDS = {
    "info": ("versions, instruction sets, threads and backends of this machine", "pyoptim.cli"),
    "bench": ("measure the optimizers beside torch.optim", "pyoptim.bench.cli"),
    "demo": ("train a small network with torch's optimizers and with pyoptim's", "pyoptim.demo"),
}
BUILD_INFO = Path(__file__).with_name("_build_info.json")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command = _parser().parse_args(words[:1]).command
    run = info if command == "info" else import_module(COMMANDS[command][1]).main
    return int(run(words[1:]) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyoptim", description="pyoptim's commands.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (text, _) in COMMANDS.items():
        # Each command parses its own options, --help included.
        commands.add_parser(name, help=text, add_help=False)
    return parser


def info(argv: Sequence[str]) -> int:
    """Prints the report of `python -m pyoptim info`; every line is printed, whatever is missing."""
    prog = "python -m pyoptim info"
    argparse.ArgumentParser(prog=prog, description=COMMANDS["info"][0]).parse_args(argv)
    for name, value in report():
        print(f"{name:<24}{value}".rstrip())
    return 0


def report() -> Iterator[tuple[str, str]]:
    """Yields (name, value) for every line of the report."""
    for title, lines in SECTIONS.items():
        yield title, ""
        for name, read in lines.items():
            yield f"  {name}", probe(read)
    yield "backends", ""
    for name in ("cuda", "triton", "cpu", "reference"):
        yield f"  {name}", probe(partial(_backend, name))


def probe(read: Callable[[], object]) -> str:
    """Returns what `read` finds; a failing probe is a line of the report, never the end of it."""
    try:
        return str(read())
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def _native(function: str) -> str:
    native = import_module("pyoptim.backend").native()
    if native is None:
        return "none: pyoptim._C is not loaded"
    value = getattr(native, function)()
    return value if isinstance(value, str) else ", ".join(value)


def _backend(name: str) -> str:
    reason = import_module("pyoptim.backend").status()[name]
    return "available" if reason is None else f"not available: {reason}"


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "absent"


def _build(part: str) -> str:
    record: dict[str, Any] = json.loads(BUILD_INFO.read_text())[part]
    if not record["built"]:
        return f"not built: {record['reason']}"
    return f"built by {record['compiler']} with {' '.join(record['flags'])}"


SECTIONS: dict[str, dict[str, Callable[[], object]]] = {
    "versions": {
        "pyoptim": lambda: import_module("pyoptim").__version__,
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": lambda: import_module("torch").__version__,
        "triton": _triton_version,
    },
    "machine": {
        "platform": platform.platform,
        "threads": lambda: f"{import_module('torch').get_num_threads()} (torch.get_num_threads())",
    },
    "instruction sets": {
        "built": partial(_native, "built_isas"),
        "supported by this CPU": partial(_native, "isas"),
        "active": partial(_native, "active_isa"),
    },
    "extension _C": {
        "cpu": partial(_build, "cpu"),
        "cuda": partial(_build, "cuda"),
        "tensors read through": partial(_native, "access_path"),
    },
}
