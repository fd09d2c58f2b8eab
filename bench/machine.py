"""What a result was measured on: processor, caches, load, versions."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

_INSTRUCTION_SETS = ("sse2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "asimd")


def describe_machine() -> dict[str, object]:
    """Processor, core count, caches, instruction sets, memory and huge-page setting."""
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "instruction_sets": _instruction_sets(cpuinfo),
        "memory_bytes": _memory_bytes(),
        "gpu": describe_gpu(),
        "huge_pages": _selected(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(load_average()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe_gpu() -> dict[str, object] | None:
    """The current CUDA device, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cache_bytes": found.L2_cache_size,
    }


def describe_versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _distribution_version("triton"),
        "pyoptim": _pyoptim_version(),
    }


def available_cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> tuple[float, float, float]:
    return os.getloadavg()


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first core, or None where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [re.fullmatch(r"(\d+)K", size.read_text().strip()) for size in sizes]
    return max((int(match[1]) * 1024 for match in found if match), default=None)


def _instruction_sets(cpuinfo: str) -> list[str]:
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def _memory_bytes() -> int | None:
    total = _field(_read("/proc/meminfo"), "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _distribution_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _pyoptim_version() -> str:
    try:
        import pyoptim
    except ImportError:
        return "not installed"
    return str(getattr(pyoptim, "__version__", "unknown"))


def _selected(choices: str) -> str | None:
    match = re.search(r"\[(\w+)\]", choices)
    return match[1] if match else None


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.M)
    return match[1].strip() if match else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
