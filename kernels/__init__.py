"""Triton kernels, one file per op. Imported only when an op needs one: `import triton` is here."""
