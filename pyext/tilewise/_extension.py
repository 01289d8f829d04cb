"""Loads the compiled extension, which registers the C++ operators, or says why it can't."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent


def _load():
    try:
        return importlib.import_module("tilewise._C"), None
    except ImportError as error:
        return None, _explain(error)


def _explain(error: ImportError) -> str:
    """Why there is no extension, as far as the build's own record tells, and what to run."""
    try:
        record = json.loads((_HERE / "_build.json").read_text())
    except OSError:
        record = {"failure": None}
    if record["failure"]:
        return (
            f"the C++ extension is not built: {record['failure']}; when that is mended, "
            f"{_command()} builds it"
        )
    if "torch" in record:
        python = "{}.{}".format(*sys.version_info)
        built = f"torch {record['torch']} (Python {record['python']})"
        running = f"torch {torch.__version__} (Python {python})"
        # A wheel may be named 2.14.1 and say 2.14.1+cu130: the build recorded its name.
        named = f"torch {importlib.metadata.version('torch')} (Python {python})"
        if built not in (running, named):
            return (
                f"the C++ extension was built for {built}, running {running}; "
                f"{_command()} builds it for this one"
            )
    if isinstance(error, ModuleNotFoundError):
        return f"the C++ extension is not built; {_command()} builds it"
    return f"the C++ extension does not load: {error}"


def _command() -> str:
    """What builds the extension for the torch that runs, here or in an installed copy's source."""
    checkout = _HERE.parents[1]
    if (checkout / "setup.py").is_file():
        return f"`python setup.py build_ext --inplace` in {checkout}"
    return "`pip install --no-build-isolation --no-deps .` in tilewise's source"


module, why_missing = _load()


def build_info() -> dict:
    """How the extension was built and what it uses of this CPU; empty where there is none."""
    return module.build_info() if module else {}
