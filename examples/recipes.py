"""All examples one after another, and one page with what they printed and drew.

    python -m examples.recipes                # all; about an hour on two cores
    python -m examples.recipes bias dfn       # some of them
    python -m examples.recipes --quick        # a look at each
    python -m examples.recipes --resume       # goes on: what was done is not done again
    python -m examples.recipes --collect      # the page alone, of what lies in --out

The page is out/recipes/index.html. One that fails is named there, and the others go on.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from examples.common import report
from examples.common.training import arguments

RECIPES = {
    "siglip": "the demo: SigLIP's fused loss beside the eager one, then 16,384 pairs a step",
    "bias": "the bias as a learnt threshold, of a unit and of SigLIP's pairs",
    "clip": "CLIP beside SigLIP, in batches of 32 to 8192, with wrong captions",
    "zero_shot": "what text supervision buys: zero-shot tasks, linear probes",
    "cheaper": "cheaper training: FLIP, LiT and CatLIP beside the plain run",
    "dfn": "better data: a filter network finds wrong captions; amount, noise, diversity",
    "blip": "BLIP on scenes: search, matching, captions, answers, a pool that cleans itself",
    "vqvae": "a VQ-VAE of digits and pictures, our quantiser beside the eager one",
    "vqgan_train": "VQGAN, stage one: pictures to codes and back, with a critic of patches",
    "vqgan_sample": "VQGAN, stage two: captions to codes to new pictures",
    "vae": "VAEs and a GAN on digits; what their latents are good for",
    "smooth": "metrics as losses: accuracy and F1 with rare and wrong labels",
    "estimators": "gradients of expectations: bias, variance, cost",
    "text_gan": "captions against a discriminator, or for BLEU",
    "distances": "one model by six distances between distributions",
}
ANEW = ("smooth", "estimators", "text_gan", "distances")  # short: they keep no checkpoints
BAR = re.compile(r"━ +\d+/\d+ +\d+:\d\d:\d\d")  # a progress bar, in what was printed to a file


class Result(NamedTuple):
    """What one recipe left in its folder."""

    name: str
    command: str
    seconds: float | None  # None: it did not run
    failed: bool
    report: str
    pictures: list[str]  # paths beside the page

    @property
    def ran(self) -> bool:
        return self.failed or bool(self.report)

    @property
    def sentence(self) -> str:
        """What the run was good for: what stands below the list of its pictures."""
        lines = self.report.partition("\nPictures: ")[2].splitlines()
        below = next((i for i, line in enumerate(lines) if not _is_path(line)), len(lines))
        return " ".join(line.strip() for line in lines[below:]).partition(" Next: ")[0]


def _is_path(line: str) -> bool:
    """Of the list of pictures, which may go over several lines."""
    return line.rstrip(" ,").endswith(".png")


def run(name: str, args: argparse.Namespace) -> None:
    """One recipe, with its output where this script's goes."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", f"examples.{name}", "--seed", str(args.seed), "--out", str(folder)]
    command += ["--quick"] * args.quick
    begun = _last(name, args.out).get("command") == shown(name, args)
    command += ["--resume"] * (args.resume and begun and name not in ANEW)
    found = {"command": shown(name, args), "seconds": None, "failed": True}
    (folder / "run.json").write_text(json.dumps(found))  # so it stays if this is killed
    began = time.perf_counter()
    status = subprocess.run([sys.executable, *command]).returncode
    found |= {"seconds": time.perf_counter() - began, "failed": status != 0}
    (folder / "run.json").write_text(json.dumps(found))


def _last(name: str, out: Path) -> dict:
    """What is known of the last run of a recipe; nothing, if there was none."""
    known = out / name / "run.json"
    return json.loads(known.read_text()) if known.exists() else {}


def shown(name: str, args: argparse.Namespace) -> str:
    """What one would type."""
    seed = f" --seed {args.seed}" if args.seed else ""
    return f"python -m examples.{name}" + seed + " --quick" * args.quick


def done(name: str, args: argparse.Namespace) -> bool:
    """Whether the same command has run to its end."""
    found = _last(name, args.out)
    return found.get("command") == shown(name, args) and not found["failed"]


def collect(name: str, out: Path) -> Result:
    folder = out / name
    known = {"command": f"python -m examples.{name}", "seconds": None, "failed": False}
    known |= _last(name, out)
    text = (folder / "report.txt").read_text() if (folder / "report.txt").exists() else ""
    lines = [line.rstrip() for line in text.splitlines() if not BAR.search(line)]
    pictures = [str(path.relative_to(out)) for path in sorted(folder.glob("*.png"))]
    return Result(name, **known, report="\n".join(lines), pictures=pictures)


# ---- the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top;
       padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #e6e6e6; }
pre { font: 12px/1.25 ui-monospace, "DejaVu Sans Mono", monospace; overflow-x: auto;
      background: #f7f7f7; padding: 1rem; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
img { max-width: 100%; } .failed { color: #b0413e; } h2 { margin-top: 3rem; }
"""


def page(results: list[Result]) -> str:
    """HTML: a table of all recipes, then of each its sentence, its pictures and what it printed."""
    rows = "".join(_row(result) for result in results)
    sections = "".join(_section(result) for result in results if result.ran)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Recipes</title>"
        f"<style>{STYLE}</style><h1>Recipes</h1><p>{html.escape(report.machine())}</p>"
        f"<table><tr><th>recipe<th>what it shows<th>time<th>what came of it{rows}</table>"
        f"{sections}</html>"
    )


def _row(result: Result) -> str:
    took = "" if result.seconds is None else report.minutes(result.seconds)
    name = f"<a href=#{result.name}>{result.name}</a>" if result.ran else result.name
    return f"<tr><td>{name}<td>{RECIPES[result.name]}<td>{took}<td>{_outcome(result)}"


def _outcome(result: Result) -> str:
    if result.failed:
        return "<span class=failed>failed</span>"
    return html.escape(result.sentence) or "not run"


def _section(result: Result) -> str:
    pictures = "".join(f"<p><img src={html.escape(path)!r} alt=''>" for path in result.pictures)
    return (
        f"<h2 id={result.name}>{result.name}: {html.escape(RECIPES[result.name])}</h2>"
        f"<p><code>{html.escape(result.command)}</code><p><b>{_outcome(result)}</b>{pictures}"
        f"<pre>{html.escape(result.report)}</pre>"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, Path("out/recipes"))
    add = parser.add_argument
    add("names", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)} (default: all)")
    add("--collect", action="store_true", help="nothing is run")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - RECIPES.keys():
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}: {', '.join(RECIPES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The number of recipes that failed."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.names or [*RECIPES]
    for i, name in enumerate(names):
        if not (args.collect or (args.resume and done(name, args))):
            print(f"\n==== {i + 1}/{len(names)}: {name}: {RECIPES[name]}", flush=True)
            run(name, args)
    results = [collect(name, args.out) for name in RECIPES]
    (args.out / "index.html").write_text(page(results))
    failed = [result.name for result in results if result.failed]
    print(f"\n{args.out / 'index.html'}" + f"; failed: {', '.join(failed)}" * bool(failed))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
