"""Visual question answering: the decoder goes on behind the question with the answer."""

from __future__ import annotations

from collections import Counter

from rich.progress import Progress

from examples.blip import decode
from examples.blip.judge import Sight
from examples.blip.model import Blip, rows_of
from examples.blip.training import AnswerRun, blanked
from examples.blip.world import HOW_MANY, Questions, questions
from examples.common.towers import PAD
from examples.common.training import train


def kind_of(question: str) -> str:
    return "how many" if question == HOW_MANY else "what is beside"


def majority(train: Questions) -> dict[str, str]:
    """The most frequent answer to each kind of question."""
    counts: dict[str, Counter] = {}
    for question, answer in zip(train.questions, train.answers, strict=True):
        counts.setdefault(kind_of(question), Counter())[answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items()}


def answer(model: Blip, data: Questions, blind: bool = False) -> list[str]:
    """An answer to each question, by the likeliest words; of equally long ones together."""
    seen = Sight(model, blanked(data.images, blind)).seen
    asked = model.tokens(data.questions).to(seen[0][0].device)
    length = (asked != PAD).sum(1)
    answers = [""] * len(asked)
    for words in length.unique().tolist():
        rows = (length == words).nonzero()[:, 0]
        written = decode.write(model, rows_of(seen, rows), prompt=asked[rows, :words])
        for row, text in zip(rows.tolist(), written, strict=True):
            answers[row] = model.tokens.text(text)
    return answers


def accuracy(given: list[str], data: Questions) -> dict[str, float]:
    """Shares of right answers by the kind of question."""
    right: dict[str, list[bool]] = {}
    for text, wanted, question in zip(given, data.answers, data.questions, strict=True):
        right.setdefault(kind_of(question), []).append(text == wanted)
    return {kind: sum(x) / len(x) for kind, x in right.items()}


def compare(begin: Blip, args, bars: Progress, seed: int) -> dict[str, dict]:
    """Accuracies of the model with pictures, of the same without, and of the majority's answer."""
    seen, heldout = (questions(part, count, seed) for part, count in
                     (("train", args.asked), (args.part, args.tested)))  # fmt: skip
    runs = [
        AnswerRun(label, begin, seen, args, seed, args.answer_steps, blind)
        for label, blind in (("answers", False), ("answers, blind", True))
    ]
    train(runs, bars, args.every, args.resume)
    most = majority(seen)
    given = answer(runs[0].model, heldout)
    return {
        "with pictures": accuracy(given, heldout),
        "text alone": accuracy(answer(runs[1].model, heldout, blind=True), heldout),
        "majority": accuracy([most[kind_of(q)] for q in heldout.questions], heldout),
        "examples": {"count": args.tested, "seed": seed, "given": given[:8]},
    }
