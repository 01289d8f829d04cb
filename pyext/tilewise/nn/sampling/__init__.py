"""Modules that sample, and the temperatures that they follow."""
