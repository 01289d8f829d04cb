"""Modules that replace vectors by codes."""
