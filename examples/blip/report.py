"""Tables and the sentence of BLIP's example."""

from __future__ import annotations

import statistics

from rich.console import Console

from examples.blip.judge import TOP, WAYS
from examples.common import report
from examples.common.report import percent, verdict

PLACES = {"picture → text": "image_to_text_1", "text → picture": "text_to_image_1"}


def tables(console: Console, found: dict) -> None:
    _kinds(console, found)
    _captions(console, found)
    _pools(console, found)
    _answers(console, found)
    _cost(console, found["cost"], found["queue"])


def recalls(of: list[dict], when: str, key: str) -> list[float]:
    """Of each seed; none where the model has no such ranking."""
    return [x["retrieval"][when][key] for x in of if when in x.get("retrieval", {})]


def both(of: list[dict], when: str) -> list[float]:
    """Recall@1 of each seed, the mean of both directions."""
    places = [recalls(of, when, key) for key in PLACES.values()]
    return [statistics.mean(pair) for pair in zip(*places, strict=True)]


def cell(values: list[float]) -> str:
    return percent(values) if values else ""


def scores(of: list[dict], way: str, key: str) -> list[float]:
    return [x["captions"][way][key] for x in of if "captions" in x]


def raised(of: list[dict]) -> list[float]:
    """Of each seed by how much ranking anew raises recall@1, the mean of both directions."""
    return [b - a for a, b in zip(both(of, "features"), both(of, "reranked"), strict=False)]


def _kinds(console: Console, found: dict) -> None:
    made = report.table(
        f"{found['scenes']} {found['part']} scenes of pairs never seen together, %, "
        "mean ± two standard errors",
        ["picture→text @1", "ranked anew", "text→picture @1", "ranked anew", "matching", "exact"],
    )
    for kind, of in found["kinds"].items():
        if kind in ("ITC + ITM", "ITC", "LM"):
            made.add_section()
        places = [cell(recalls(of, when, key)) for key in PLACES.values()
                  for when in ("features", "reranked")]  # fmt: skip
        matching = cell([x["matching"] for x in of if "matching" in x])
        made.add_row(kind, *places, matching, cell(scores(of, "greedy", "exact")))
    made.add_section()
    made.add_row("chance", *[f"{100 / found['scenes']:.1f}", ""] * 2, "50.0", "")
    console.print(made)
    for kind, of in found["kinds"].items():
        if change := raised(of):
            console.print(
                f"Ranking the best {TOP} anew by matching, {kind}: "
                f"{percent(change, '+')} points of recall@1, {verdict(change)}."
            )
    plain = found["kinds"]["BLIP"]
    for name in ("BLIP, no queue", "BLIP, no soft targets"):
        for when, word in (("features", "by features"), ("reranked", "ranked anew")):
            pairs = zip(both(plain, when), both(found["kinds"][name], when), strict=True)
            change = [b - a for a, b in pairs]
            console.print(
                f"{name}, recall@1 {word}: {percent(change, '+')} points from BLIP's, "
                f"{verdict(change)}."
            )


def _captions(console: Console, found: dict) -> None:
    made = report.table("Their captions, %", ["BLEU-4", "exact", "words in place"])
    for kind, of in found["kinds"].items():
        for way in WAYS if scores(of, "greedy", "bleu") else ():
            cells = (percent(scores(of, way, key)) for key in ("bleu", "exact", "words"))
            made.add_row(f"{kind}, {way}", *cells)
    near = found["nearest"]
    made.add_row("nearest drawing's caption", *(f"{100 * near[k]:.1f}" for k in near))
    console.print(made)
    more = [x - near["bleu"] for x in scores(found["kinds"]["BLIP"], "greedy", "bleu")]
    console.print(
        f"BLIP, greedy, beside the nearest drawing's caption: {percent(more, '+')} points of "
        f"BLEU-4, {verdict(more)}."
    )


def _pools(console: Console, found: dict) -> None:
    made = report.table(
        "Trained on a pool of the same pictures, %",
        ["true captions", "recall@1", "ranked anew", "BLEU-4", "exact", "BLEU-4 from noisy's"],
    )
    noisy = scores(found["pools"]["noisy"], "greedy", "bleu")
    for name, of in found["pools"].items():
        true = [x["true"].get(name, 1.0) for x in found["capfilt"]]
        places = [percent(both(of, when)) for when in ("features", "reranked")]
        bleu = scores(of, "greedy", "bleu")
        change = [b - a for a, b in zip(noisy, bleu, strict=True)]
        made.add_row(
            name, percent(true), *places, percent(bleu), percent(scores(of, "greedy", "exact")),
            "" if name == "noisy" else f"{percent(change, '+')} {verdict(change)}",
        )  # fmt: skip
    console.print(made)
    _filter(console, found["capfilt"])


def _filter(console: Console, seeds: list[dict]) -> None:
    of = {
        key: percent([x["filter"][key] for x in seeds])
        for key in ("precision", "not right", "recall", "right kept", "vague kept")
    }
    of |= {key: percent([x[key] for x in seeds]) for key in ("kept", "kept exact")}
    written = percent([x["written"]["exact"] for x in seeds])
    console.print(
        f"Of what the filter drops {of['precision']} % is wrong and {of['not right']} % wrong or "
        f"vague.\nIt finds {of['recall']} % of the wrong captions, and keeps {of['right kept']} "
        f"% of the right and {of['vague kept']} % of the vague ones.\nOf the captions written by "
        f"nucleus sampling {written} % are true, and {of['kept exact']} %\n"
        f"of the {of['kept']} % that the filter keeps."
    )


def _answers(console: Console, found: dict) -> None:
    ways = {name: [x[name] for x in found["answers"]]
            for name in ("with pictures", "text alone", "majority")}  # fmt: skip
    kinds = list(ways["majority"][0])
    made = report.table("Answers about scenes with pairs never seen together, % right", list(ways))
    for kind in kinds:
        made.add_row(f"{kind}?", *(percent([x[kind] for x in of]) for of in ways.values()))
    console.print(made)


def _cost(console: Console, found: dict, queue: int) -> None:
    made = report.table(f"A step at a queue of {queue:,}, batch 64, features of 256", list(found))
    parts = next(iter(found.values()))["seconds"]
    for part in parts:
        made.add_row(part, *(report.duration(x["seconds"][part]) for x in found.values()))
    made.add_section()
    made.add_row("whole step", *(report.duration(total(x)) for x in found.values()))
    made.add_row("extra peak memory", *(report.memory(x["peak_mb"]) for x in found.values()))
    made.add_row("contrast's loss", *(f"{x['contrast']:.6f}" for x in found.values()))
    console.print(made)


def total(cost: dict) -> float:
    return sum(cost["seconds"].values())


def value(found: dict) -> str:
    """What came of it, in a sentence."""
    blip = found["kinds"]["BLIP"]
    change = raised(blip)
    noisy, clean = (scores(found["pools"][name], "greedy", "bleu") for name in ("noisy", "both"))
    cleaned = [b - a for a, b in zip(noisy, clean, strict=True)]
    ours, eager = (cost["seconds"]["contrast"] for cost in found["cost"].values())
    exact = scores(blip, "greedy", "exact")

    def said(differences: list[float]) -> str:
        word = verdict(differences)  # of one seed there is none
        return f" ({word})" if word else ""

    return (
        f"One model names pairs that it never saw together, {percent(exact)} % of captions to the "
        f"word; matching changes recall@1 by {percent(change, '+')} points{said(change)}, "
        f"cleaning its own noisy pool BLEU-4 by {percent(cleaned, '+')}{said(cleaned)}; at a "
        f"queue of {found['queue']:,} the contrast takes {report.duration(ours)}, in eager "
        f"operations {report.duration(eager)}."
    )
