"""Triton kernels of pyoptim, imported as `pyoptim.kernels`."""

if __name__ != "pyoptim.kernels":
    raise ImportError(
        f"this folder is the package 'pyoptim.kernels', not {__name__!r}; install pyoptim "
        "(pip install -e .) and import pyoptim.kernels"
    )


def triton_status() -> str | None:
    """Returns None if Triton can launch kernels here, else the reason in one line; never raises."""
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed"
    except Exception as error:
        return f"triton cannot be imported: {_first_line(error)}"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton found no GPU driver: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
