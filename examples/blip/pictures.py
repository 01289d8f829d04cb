"""The picture of BLIP's example: captions, rankings before and after, the pool, answers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from examples.blip import judge
from examples.blip.model import Blip
from examples.blip.world import Captioned, questions
from examples.common import report
from examples.common.data import CREDIT
from examples.common.report import GREEN, INK, MUTED, RED

ROWS = 4


def show(place, image: torch.Tensor, edge: str = MUTED) -> None:
    place.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    place.set(xticks=[], yticks=[])
    place.grid(False)
    for spine in place.spines.values():
        spine.set(visible=True, color=edge, linewidth=0.8 if edge == MUTED else 2)


def say(place, lines: list[tuple[str, str]], size: float = 8) -> None:
    """Lines of text and their colours, from the top."""
    place.axis("off")
    for i, (text, color) in enumerate(lines):
        place.text(0.02, 0.86 - 0.25 * i, text, color=color, fontsize=size, va="center",
                   transform=place.transAxes)  # fmt: skip


def sheet(model: Blip, seen: Captioned, part: Captioned, found: dict, path: Path) -> None:
    with report.picture(path, dpi=100):
        figure = plt.figure(figsize=(15, 9.4))
        upper, lower = figure.subfigures(2, 1)
        left, right = upper.subfigures(1, 2, width_ratios=[1, 1.25])
        _captions(left, model, part)
        _ranking(right, model, part)
        left, right = lower.subfigures(1, 2, width_ratios=[1.25, 1])
        _pool(left, seen, found["capfilt"][0]["examples"])
        _answered(right, found["part"], found["answers"][0]["examples"])
        figure.text(0.995, 0.004, CREDIT, fontsize=6, color=MUTED, ha="right")


def _grid(figure, title: str, columns: list[float], rows: int = ROWS):
    figure.suptitle(title, x=0.03, y=0.98, ha="left", weight="bold", fontsize=10)
    return figure.subplots(rows, len(columns), squeeze=False, gridspec_kw={
        "width_ratios": columns, "left": 0.03, "right": 0.98, "top": 0.9, "bottom": 0.03,
        "hspace": 0.18, "wspace": 0.06})  # fmt: skip


def some(count: int, wanted: int) -> list[int]:
    """Rows drawn by a fixed seed, not chosen."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))[:wanted].tolist()


def _captions(figure, model: Blip, part: Captioned) -> None:
    rows = some(len(part.captions), 2 * ROWS)
    images = part.images[rows, 0]
    written = {way: judge.write_all(model, images, way) for way in judge.WAYS}
    axes = _grid(figure, "Captions of pairs never seen together; green: true", [1, 2.6] * 2)
    for i, (row, (place, text)) in enumerate(zip(rows, axes.reshape(-1, 2), strict=True)):
        show(place, images[i])
        true = part.captions[row]
        say(text, [(texts[i], GREEN if texts[i] == true else RED) for texts in written.values()])
    axes[0, 1].text(0.02, 1.08, "greedy, beam 3, nucleus", fontsize=7, color=MUTED,
                    transform=axes[0, 1].transAxes)  # fmt: skip


def _ranking(figure, model: Blip, part: Captioned) -> None:
    """Captions whose best pictures change, drawn by a fixed seed."""
    sight = judge.Sight(model, part.images[:, 0])
    scores = judge.similarity(model, sight, part.captions).T.cpu()
    again = judge.reranked(
        scores.to(sight.features.device),
        lambda text, picture: judge.match_scores(model, sight, part.captions, picture, text),
        judge.TOP,
    ).cpu()
    changed = (scores.argmax(1) != again.argmax(1)).nonzero()[:, 0].tolist()
    rows = [changed[i] for i in some(len(changed), ROWS)]
    title = "Captions whose best picture changes: by features, below it ranked anew; green: right"
    axes = _grid(figure, title, [1.1] + [1] * 4 + [1.1] + [1] * 4)
    for place in axes.flat:
        place.axis("off")
    for i, row in enumerate(rows):
        half = axes[2 * (i % 2) : 2 * (i % 2) + 2, 5 * (i // 2) : 5 * (i // 2) + 5]
        words = part.captions[row].split()
        half[0, 0].text(0, 0.5, f"{' '.join(words[:2])}\n{' '.join(words[2:-2])}\n"
                        f"{' '.join(words[-2:])}", va="center", color=INK, fontsize=8)  # fmt: skip
        for line, ranking in zip(half, (scores, again), strict=True):
            for place, best in zip(line[1:], ranking[row].topk(4).indices.tolist(), strict=True):
                place.axis("on")
                show(place, part.images[best, 0], GREEN if best == row else MUTED)


def _pool(figure, seen: Captioned, examples: list[dict]) -> None:
    shown = [
        example for kind, count in (("right", 2), ("wrong", 3), ("vague", 3))
        for example in [x for x in examples if x["kind"] == kind][:count]
    ]  # fmt: skip
    title = "The noisy pool: what came with a picture, what the captioner wrote; green: true"
    axes = _grid(figure, title, [1, 3.2] * 2)
    for place in axes.flat:
        place.axis("off")
    for example, (place, text) in zip(shown, axes.reshape(-1, 2), strict=False):
        place.axis("on")
        show(place, seen.images[example["row"], 0])
        for i, (source, label) in enumerate((("web", example["kind"]), ("written", "written"))):
            kept, said = example[f"{source} kept"], example[source]
            color = GREEN if said == seen.captions[example["row"]] else RED
            said = said if kept else f"dropped: {said}"
            text.text(0.02, 0.78 - 0.5 * i, label, fontsize=7, color=MUTED, va="center")
            text.text(0.02, 0.56 - 0.5 * i, said, fontsize=8, color=color, va="center",
                      alpha=1 if kept else 0.5)  # fmt: skip


def _answered(figure, part: str, examples: dict) -> None:
    heldout = questions(part, examples["count"], examples["seed"])
    axes = _grid(figure, "Questions and the decoder's answers; green: right", [1, 2.6] * 2)
    for i, (place, text) in enumerate(axes.reshape(-1, 2)):
        show(place, heldout.images[i])
        given = examples["given"][i]
        right = given == heldout.answers[i]
        words = heldout.questions[i].split()
        lines = [" ".join(words[:4]), " ".join(words[4:])] if len(words) > 4 else [" ".join(words)]
        lines[-1] += "?"
        say(text, [(line, INK) for line in lines] + [(given, GREEN if right else RED)])
