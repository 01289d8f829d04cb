"""Tables and the sentence of the VAE's example."""

from __future__ import annotations

from rich.console import Console

from examples.common import report

NAMES = {
    "normal": "normal", "normal, eager": "  eager operations, same seed",
    "normal, eager, other noise": "  eager operations, other noise", "uniform": "uniform",
    "normal, of two": "normal, two numbers", "uniform, of two": "uniform, two numbers",
    "codes": "20 codes of 32, GumbelQuantizer",
}  # fmt: skip


def tables(console: Console, found: dict) -> None:
    _bounds(console, found)
    _samples(console, found["samples"])
    made = report.table("Lower half of a digit, given the upper one", ["nats"])
    for name, nats in sorted(found["half"]["nats"].items(), key=lambda item: item[1]):
        made.add_row(name, f"{nats:.1f}")
    console.print(made)
    made = report.table("Labels by a linear probe, % right, by labels seen",
                        [f"{n:,}" for n in found["labels"]])  # fmt: skip
    for name, accuracy in found["probe"].items():
        made.add_row(name, *(f"{100 * x:.1f}" for x in accuracy))
    console.print(made)
    scores = found["anomalies"]
    kinds = list(next(iter(scores.values())))
    made = report.table("Strange pictures ranked above digits, % of pairs", kinds)
    for name, areas in scores.items():
        made.add_row(name, *(f"{100 * areas[kind]:.1f}" for kind in kinds))
    console.print(made)


def _bounds(console: Console, found: dict) -> None:
    made = report.table(
        "Held-out binary digits, nats: upper bounds of -log p(x)",
        ["steps", "-ELBO", "of it KL", f"{found['importance']} samples", "a step"],
    )
    for name, x in found["bounds"].items():
        made.add_row(
            NAMES.get(name, f"20 categories of 10, {name}"), str(x["steps"]), f"{x['elbo']:.2f}",
            f"{x['kl']:.1f}", f"{x['importance']:.2f}" if "importance" in x else "",
            report.duration(x["ms"] / 1e3),
        )  # fmt: skip
    console.print(made)
    console.print(
        "Published: 86.76 nats for a VAE of 50 numbers and two hidden layers of 200, with 5,000\n"
        "samples (Burda et al. 2016, table 1), learned from 60,000 digits; these learn from 4,000."
    )


def _samples(console: Console, found: dict) -> None:
    made = report.table(
        "1,000 samples beside 1,000 new digits",
        ["MMD² × 1000", "told apart, 14 × 14", "7 × 7", "nearest training digit", "of these"],
    )
    for name, x in found.items():
        cells = ["", "", ""]
        if "mmd" in x:
            cells = [f"{x['mmd']:.2f}", *(f"{100 * x[f'apart {n}']:.1f} %" for n in (14, 7))]
        label = {"normal": "VAE, normal", "uniform": "VAE, uniform", "codes": "VAE, codes"}
        name = f"VAE, {name}" if name.startswith("Gumbel") else label.get(name, name)
        made.add_row(name, *cells, f"{x['nearest']:.2f}", str(x["different"]))
    console.print(made)
    console.print("Nearest: mean distance over that of new digits; of these: different ones.")


def curve_difference(a: list, b: list) -> float:
    """The mean distance of two curves in nats, over their second half."""
    pairs = list(zip(a, b, strict=True))
    later = pairs[len(pairs) // 2 :]
    return sum(abs(x[1] - y[1]) for x, y in later) / len(later)


def value(found: dict) -> str:
    """What came of it, in a sentence."""
    bounds = found["bounds"]
    ours, eager, other = (
        bounds[name] for name in ("normal", "normal, eager", "normal, eager, other noise")
    )
    apart = curve_difference(ours["curve"], eager["curve"])
    noise = curve_difference(eager["curve"], other["curve"])
    gan, vae = (found["samples"][name]["apart 14"] for name in ("GAN", "normal"))
    nats = found["half"]["nats"]
    return (
        f"-ELBO {ours['elbo']:.1f} nats, with eager operations {eager['elbo']:.1f}: the curves are "
        f"{apart:.2f} nats apart, two eager ones with different noise {noise:.2f}. A classifier "
        f"tells the VAE's samples from digits in {100 * vae:.0f} % of cases, the GAN's in "
        f"{100 * gan:.0f} %. The lower half of a digit costs {nats['VAE, 100 completions']:.0f} "
        f"nats given the upper one, {nats['mean digit']:.0f} by the mean digit."
    )
