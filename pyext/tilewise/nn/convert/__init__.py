"""Modules of other packages as ours, and state dicts for them. None needs the package."""
