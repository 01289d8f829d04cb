"""Compares the nearest-code filter with all distances: `python -m tools.filter_against_brute`.

On random rows and on rows without a sign, whose products are the worst for matrix units that cut
what they add. On a CPU (`--device cpu`) it compares with the reference, on few rows.
"""

import argparse
import sys
from unittest import mock

import torch

import tilewise as tw

PROBLEMS = ("normal", 64, 2048), ("positive", 512, 1024), ("positive", 4096, 256)
MAKERS = {"normal": torch.randn, "positive": torch.rand}


def wrong(make: str, rows: int, dim: int, codes: int, device: str) -> int:
    """Rows whose index or distance is another one."""
    x = MAKERS[make](rows, dim, device=device)
    codebook = MAKERS[make](codes, dim, device=device)
    ours = tw.nearest_code(x, codebook)
    if device == "cpu":
        with tw.backend("reference"):
            exact = tw.nearest_code(x, codebook)
    else:
        from tilewise.kernels import nearest_code as kernels

        with mock.patch.object(kernels, "DEFAULT_SMALL", 2**62):
            exact = tw.nearest_code(x, codebook)
    differ = (ours.index != exact.index) | (ours.distance != exact.distance)
    return int(differ.sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--piece", type=int, default=2**18, help="rows at a time")
    options = parser.parse_args()
    torch.manual_seed(0)
    mistakes = 0
    for make, dim, codes in PROBLEMS:
        rows = max(options.rows * 64 // dim, 1)
        for start in range(0, rows, options.piece):
            mistakes += wrong(make, min(options.piece, rows - start), dim, codes, options.device)
        print(f"{make}: {rows} rows of {dim}, {codes} codes: {mistakes} wrong so far", flush=True)
    return int(mistakes > 0)


if __name__ == "__main__":
    sys.exit(main())
