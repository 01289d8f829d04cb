"""Loads the compiled extension, which registers the C++ operators, or says why it can't."""

import importlib


def _load():
    try:
        return importlib.import_module("tilewise._C"), None
    except ModuleNotFoundError:
        return None, (
            "the C++ extension is not built: `pip install .` (or, in a checkout, "
            "`python setup.py build_ext --inplace`) builds it and needs a C++17 compiler"
        )
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}"


module, why_missing = _load()


def build_info() -> dict:
    """How the extension was built and what it uses of this CPU; empty where there is none."""
    return module.build_info() if module else {}
