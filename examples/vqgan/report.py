"""Tables and last sentences of both stages."""

from __future__ import annotations

import math

from rich.console import Console

from examples.common import report
from examples.vqgan.stage_one import VARIANTS


def stage_one(console: Console, found: dict) -> None:
    made = report.table(
        f"{found['heldout']} held-out pictures and {found['scenes']} held-out scenes, rebuilt",
        ["MSE", "PSNR, dB", "SSIM", "Fréchet", "right caption first", "codes used", "perplexity",
         "bits"],
    )  # fmt: skip
    for name, x in found["rows"].items():
        usage = [str(x["used"]), f"{x['perplexity']:.0f}"] if "used" in x else ["", ""]
        bits = f"{x['bits']:,.0f}" if "bits" in x else ""
        psnr = f"{x['psnr']:.2f}" if x["mse"] else "lossless"
        made.add_row(
            VARIANTS.get(name, name), f"{x['mse']:.4f}", psnr, f"{x['ssim']:.3f}",
            f"{x['frechet']:.3f}", f"{100 * x['first']:.1f} %", *usage, bits,
        )  # fmt: skip
    console.print(made)
    console.print(
        "Fréchet: of means and covariances of features of the SigLIP image tower, which no loss\n"
        f"uses. It also looks for the right caption among {found['heldout']}: chance is "
        f"{100 / found['heldout']:.1f} %."
    )
    for name, x in found["fields"].items():
        more = "" if x["end"] else "; by convolutions, then attention sees everything"
        console.print(
            f"What {name} sees: {x['size']} × {x['size']} pixels, {x['jump']} from one to the next "
            f"({x['units']} × {x['units']} of them){more}."
        )
    if found["cost"]:
        _share(console, "One step of training", "the quantiser", found["cost"], found["step_ms"])


def _share(console: Console, title: str, part: str, cost: dict, step_ms: float) -> None:
    """A part's time and share of a step, ours and the eager one in the same step."""
    made = report.table(title, ["tilewise", "eager"])
    rest = step_ms - cost["tilewise"]["ms"]
    own = [cost[name]["ms"] for name in ("tilewise", "eager")]
    made.add_row(part, *(report.duration(ms / 1e3) for ms in own))
    made.add_row("the rest of the step", *2 * [report.duration(rest / 1e3)])
    made.add_row(f"share of {part}", *(f"{100 * ms / (ms + rest):.1f} %" for ms in own))
    console.print(made)


def stage_one_value(found: dict) -> str:
    rows = found["rows"]
    gan, plain, png = rows["gan"], rows["plain"], rows["PNG"]
    return (
        f"{gan['bits'] / 8:.0f} bytes a picture, {png['bits'] / gan['bits']:.0f} times fewer than "
        f"PNG; perceptual loss and critic bring the Fréchet distance from {plain['frechet']:.3f} "
        f"to {gan['frechet']:.3f}."
    )


# ---- stage two


def stage_two(console: Console, found: dict) -> None:
    cells = found["length"]
    made = report.table("Negative log-likelihood", ["nats a code", "bits a picture"])
    for name, nats in found["nats"].items():
        made.add_row(name, f"{nats:.3f}", f"{nats * cells / math.log(2):.0f}")
    console.print(made)
    made = report.table(
        "Right caption first among the validation pictures' captions, %",
        [f"guidance {s:g}" for s in found["guidances"]],
    )
    for k in found["tops"]:
        made.add_row(
            f"top {k}", *(f"{100 * found['grid'][s, k]:.1f}" for s in found["guidances"])
        )
    console.print(made)
    _samples(console, found)
    _budget(console, found)
    _share(console, f"One step of sampling {found['rows_sampled']} pictures", "the draw",
           found["cost"], found["step_ms"])  # fmt: skip


def _samples(console: Console, found: dict) -> None:
    rule = found["rule"]
    made = report.table(
        f"Pictures for held-out captions, guidance {rule['guidance']:g}, top {rule['top_k']}",
        ["of", "right caption first", "among 5", "Fréchet", "nearest seen", "nearer than 5 %"],
    )
    for name, x in found["samples"].items():
        frechet = f"{x['frechet']:.3f}" if "frechet" in x else ""
        near = [f"{x['near']:.3f}", f"{100 * x['copies']:.1f} %"] if "near" in x else ["", ""]
        made.add_row(name, str(x["of"]), f"{100 * x['first']:.1f} %", f"{100 * x['five']:.1f} %",
                     frechet, *near)  # fmt: skip
    console.print(made)
    console.print(
        "Right caption: by SigLIP, among all of the part's. Nearest seen: root mean square to the\n"
        "nearest rebuilt training picture, in 16 × 16 means; last, how many samples lie nearer "
        "than 95 %\nof rebuilt held-out pictures do."
    )


def _budget(console: Console, found: dict) -> None:
    made = report.table(
        "Why to compress first: the same blocks, about the same time",
        ["seconds", "pictures seen", "places a picture", "right caption first"],
    )
    for name, x in found["budget"].items():
        made.add_row(name, f"{x['seconds']:.0f}", f"{x['pictures']:,}", str(x["places"]),
                     f"{100 * x['first']:.1f} % of {x['of']}")  # fmt: skip
    console.print(made)


def stage_two_value(found: dict) -> str:
    x, chance = found["samples"]["samples"], found["samples"]["chance"]["first"]
    return (
        f"The right one of {x['among']} captions comes first for {100 * x['first']:.1f} % of the "
        f"samples, {x['first'] / chance:.1f} times chance; {100 * x['copies']:.1f} % lie nearer to "
        "a training picture than 95 % of new pictures do."
    )
