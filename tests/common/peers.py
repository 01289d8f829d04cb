"""Packages that tests compare with or run on: where one is missing, the tests say so by name."""

import importlib.util

import pytest


def need(*packages: str) -> None:
    """Skips the test, or the module that is being imported, if one of the packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)
