"""Learning a generative model: one family and the same targets, by six distances.

    python -m examples.distances             # three and a half minutes on two cores
    python -m examples.distances --quick     # a look at every stage

To learn a generative model is to lower a distance d(data, model). Which one decides what is asked
for, a density or only samples, and what is found where the model cannot be like the data.

1. A Gaussian along the axes is fitted to one of its kind, to a slanted one and to two bumps: by
   maximum likelihood, the reverse divergence (reparameterised, and by the score function), the
   maximum mean discrepancy, the sliced Wasserstein distance, and against a critic. Each has an
   optimum that integrals give without samples.
2. Networks that only sample learn a ring of bumps by the distances that need no density.
3. A kernel density learns nothing and keeps all data: its error and its cost by their number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import Progress

from examples.common import report
from examples.common.training import arguments, conduct
from examples.distances import exact, free
from examples.distances import report as pages
from examples.distances.fit import FROM_SAMPLES, KINDS, fit
from examples.distances.targets import TARGETS


def run(args, bars: Progress) -> dict:
    found: dict = {"optima": {}, "lowest": {}, "fits": {}}
    for target in TARGETS:
        task = bars.add_task(target.name, total=len(KINDS) * args.seeds, note="")
        optima, lowest, fits = {}, {}, {}
        for kind, of in KINDS.items():
            best = exact.optimum(of.distance, target)
            optima[kind], lowest[kind] = best.tolist(), float(of.distance(best, target))
            fits[kind] = []
            for seed in range(args.seed, args.seed + args.seeds):
                fits[kind].append(fit(kind, target, args, seed))
                bars.update(task, advance=1, note=kind)
        for key, values in (("optima", optima), ("lowest", lowest), ("fits", fits)):
            found[key][target.name] = values
    task = bars.add_task("a ring, without a family", total=len(FROM_SAMPLES), note="")
    found["ring"] = free.on_the_ring(args, lambda: bars.update(task, advance=1))
    found["sizes"] = data_sizes(args, bars)
    return found


def data_sizes(args, bars: Progress) -> dict:
    """Error and cost of a kernel density and of a Gaussian by the number of data points."""
    inside, bumps = TARGETS[0], TARGETS[-1]
    task = bars.add_task("kernel density", total=3, note="")
    seeds = range(args.seed, args.seed + args.seeds)
    found: dict = {"sizes": args.sizes, "error": {}}
    for target in (inside, bumps):
        found["error"][target.name] = free.by_data_size(target, args.sizes, seeds)
        bars.update(task, advance=1)
    found["ms"] = free.cost(inside, args.sizes, args.measure)
    bars.update(task, advance=1)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/distances"), resumes=False)
    add = parser.add_argument
    add("--steps", type=int, default=800, help="of each fit")
    add("--batch", type=int, default=256, help="samples of each side in a step")
    add("--rate", type=float, default=0.03, help="highest learning rate (default: %(default)s)")
    add("--seeds", type=int, default=3, help="of each fit, from --seed on")
    add("--measure", type=float, default=3.0, help="seconds for timing the densities")
    args = parser.parse_args(argv)
    args.sizes = [100, 300, 1000, 3000, 10000]
    if args.quick:
        args.steps, args.seeds, args.measure, args.sizes = 30, 1, 0.2, [100, 400]
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    console, found = conduct("Distances between distributions", args, run)
    pages.tables(console, found)
    pages.fits(found, args.out / "fits.png")
    pages.on_the_ring(found, args.out / "ring.png")
    pages.sizes(found["sizes"], args.out / "sizes.png")
    names = ["fits.png", "ring.png", "sizes.png"]
    report.finish(console, args.out, names, pages.value(found), found)
    return found


if __name__ == "__main__":
    main()
