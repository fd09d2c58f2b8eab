"""Triton kernels of pyoptim, imported as `pyoptim.kernels`."""

if __name__ != "pyoptim.kernels":
    raise ImportError(
        f"this folder is the package 'pyoptim.kernels', not {__name__!r}; install pyoptim "
        "(pip install -e .) and import pyoptim.kernels"
    )


def triton_status() -> str | None:
    """Returns None if Triton can launch kernels here, else the reason in one line; never raises.

    With TRITON_INTERPRET=1 they run on CPU tensors; `device_type` says which it is.
    """
    for library in ("triton", "numpy"):
        try:
            __import__(library)
        except ModuleNotFoundError as error:
            # A broken installation lacks some other module.
            is_absent = error.name == library
            return f"{library} is not installed" if is_absent else _cannot_import(library, error)
        except Exception as error:
            return _cannot_import(library, error)
    try:
        return _driver_status()
    except Exception as error:
        return f"triton found no GPU driver: {_first_line(error)}"


def device_type() -> str:
    """Returns the type of the devices that the kernels run on: "cuda", or "cpu" if interpreted."""
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


def _driver_status() -> str | None:
    if device_type() == "cpu":
        return None
    import triton

    backend = triton.runtime.driver.active.get_current_target().backend
    return None if backend == "cuda" else f"triton drives {backend!r} here; the kernels need 'cuda'"


def _cannot_import(library: str, error: Exception) -> str:
    return f"{library} cannot be imported: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
