"""What the contracts of the Triton backend have to know of each op over all image-text pairs."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from benchmarks.baselines import (
    eager_clip_loss,
    eager_info_nce,
    eager_itc_loss,
    eager_sigmoid_loss,
)
from tests.common import cross_entropy_cases
from tests.common.budget import assert_within_budget
from tests.common.contrastive_cases import Case, ids, related, unrelated
from tests.ops import test_itc_loss, test_sigmoid_loss
from tests.ops.test_itc_loss import Problem
from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tests.triton_tools.checker import Updated
from tilewise.kernels import (
    _cross_entropy,
    _ids,
    clip_loss,
    hard_negatives,
    info_nce,
    itc_loss,
    sigmoid_loss,
)
from tilewise.reference import _philox
from tilewise.reference._matches import matches

INF = float("inf")
NUMBERED = {kernel: ["number_ptr", "count_ptr"] for kernel in (_ids.match_ids, _ids.match_few_ids)}


@dataclass(frozen=True)
class Contrast:
    """`run(problem, tensors)` gives the kernels' results; `make` a problem of related features."""

    op: str
    make: Callable[..., Any]  # (rows, cols, depth, **options of a Case) -> problem
    tensors: Callable[[Any, torch.dtype], dict[str, Tensor | None]]
    run: Callable[..., tuple[Tensor, ...]]  # with needs= for gradients
    check: Callable[[Any, torch.dtype], None]  # the results are right
    chunked: list[Any]  # problems that take many small chunks
    small: Mapping[str, int]  # globals that make chunks of about two tiles by one and a half
    outputs: Mapping[Any, list[str]]  # of each kernel
    workspace: Mapping[str, int]  # bytes of outputs with CHUNK_BYTES of 8192, 64 rows and columns
    gradients: int = 0
    offsets: tuple = ()  # that a problem may be made with

    @property
    def kernels(self) -> ModuleType:
        return importlib.import_module(f"tilewise.kernels.{self.op}")


def names_of(contrast: Contrast) -> tuple[str, ...]:
    return tuple(contrast.tensors(contrast.make(2, 2, 2), torch.float32))


def make_case(rows: int, cols: int, depth: int, **options) -> Case:
    options.setdefault("make", related(rows, cols, depth))
    return Case(f"{rows}x{cols}x{depth}", **options)


def features(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    image, text = case.features(dtype)
    return {"image_features": image, "text_features": text}


def operands(positives) -> tuple:
    """An op's three arguments that say what matches."""
    return (None, *positives) if isinstance(positives, tuple) else (positives, None, None)


def checked_gradients(ours: dict, dtype: torch.dtype, *names: str) -> dict:
    """Results are float32; those of features are compared after rounding to the features' dtype."""
    assert all(value.dtype == torch.float32 for value in ours.values())
    return ours | {name: ours[name].to(dtype) for name in names}


# sigmoid_loss

def run_sigmoid(case: Case, tensors, needs=(True,) * 4):
    scale = torch.tensor(case.logit_scale)
    bias = None if case.logit_bias is None else torch.tensor(case.logit_bias)
    return sigmoid_loss.sigmoid_loss(
        *tensors.values(), scale, bias, *operands(case.positives), *needs
    )


def check_sigmoid(case: Case, dtype: torch.dtype):
    tensors = features(case, dtype)
    exact = [x.double() for x in tensors.values()]
    outputs = test_sigmoid_loss.outputs
    truth = outputs(tw.reference.sigmoid_loss, case, exact, torch.float64)
    names = ("loss", "d_image", "d_text", "d_scale", "d_bias")
    ours = dict(zip(names, run_sigmoid(case, tensors), strict=True))
    if case.logit_bias is None:
        ours.pop("d_bias")
    ours = checked_gradients(ours, dtype, "d_image", "d_text")
    eager = outputs(eager_sigmoid_loss, case, tuple(tensors.values()), torch.float32)
    magnitudes = test_sigmoid_loss.magnitudes(case, *exact, truth)
    assert_within_budget(ours, eager, truth, magnitudes)


SIGMOID = Contrast(
    op="sigmoid_loss", make=make_case, tensors=features, run=run_sigmoid, check=check_sigmoid,
    chunked=[
        Case("chunks", related(80, 100, 20)),
        Case("chunks-aligned", related(64, 96, 16)),
        Case("chunks-offset", related(70, 100, 20), positives=37),
        Case("chunks-negative-offset", related(100, 70, 20), positives=-51, logit_bias=None),
        Case("chunks-no-positives", related(70, 70, 4), positives=None),
        Case("chunks-ids", related(70, 100, 20), positives=ids(70, 100, 60)),
    ],
    small={"CHUNK_COLS": 48, "CHUNK_BYTES": 64 * 64 * 2},
    outputs={
        sigmoid_loss.sigmoid_tile: ["grad_ptr", "sums_ptr"],
        sigmoid_loss.finish_sigmoid: [
            "loss_ptr", "d_scale_ptr", "d_bias_ptr", "image_out_ptr", "text_out_ptr",
        ],
        **NUMBERED,
    },
    workspace={"grad_ptr": 8192},
    gradients=4, offsets=(0, -40, 1000, -1000, 2**40, -(2**40), None),
)


# clip_loss, info_nce

@dataclass(frozen=True)
class Smoothed(Case):
    smoothing: float = 0.1


def make_smoothed(*sizes: int, **options) -> Smoothed:
    case = make_case(*sizes, **options)
    return Smoothed(**vars(case))


def run_clip(case: Smoothed, tensors, needs=(True,) * 3):
    return _run_cross_entropy(clip_loss.clip_loss, case, tensors, needs)


def run_info_nce(case: Smoothed, tensors, needs=(True,) * 3):
    return _run_cross_entropy(info_nce.info_nce, case, tensors, needs)


def _run_cross_entropy(kernel, case: Smoothed, tensors, needs):
    scale = torch.tensor(case.logit_scale)
    return kernel(*tensors.values(), scale, *operands(case.positives), case.smoothing, *needs)


def query_and_keys(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return dict(zip(("query", "keys"), case.features(dtype), strict=True))


def check_clip(case: Smoothed, dtype: torch.dtype):
    ours = run_clip(case, features(case, dtype))
    _check_cross_entropy(ours, tw.reference.clip_loss, eager_clip_loss, case, dtype)


def check_info_nce(case: Smoothed, dtype: torch.dtype):
    ours = run_info_nce(case, query_and_keys(case, dtype))
    sides = (cross_entropy_cases.ROWS,)
    _check_cross_entropy(ours, tw.reference.info_nce, eager_info_nce, case, dtype, sides)


def _check_cross_entropy(results, reference, eager, case: Smoothed, dtype, *sides):
    pair, outputs, smoothing = case.features(dtype), cross_entropy_cases.outputs, case.smoothing
    exact = [x.double() for x in pair]
    truth = outputs(reference, case, exact, torch.float64, smoothing)
    ours = checked_gradients(dict(zip(truth, results, strict=True)), dtype, "d_image", "d_text")
    magnitudes = cross_entropy_cases.magnitudes(case, *exact, smoothing, *sides)
    assert_within_budget(ours, outputs(eager, case, pair, dtype, smoothing), truth, magnitudes)


SMOOTHED_CHUNKS = [
    Smoothed("chunks", related(80, 70, 20)),
    Smoothed("chunks-aligned", related(64, 96, 16)),
    Smoothed("chunks-offset", related(70, 100, 20), positives=37, smoothing=0.0),
    Smoothed("chunks-negative-offset", related(100, 70, 20), positives=-51),
    Smoothed("chunks-ids", related(90, 70, 20), positives=ids(90, 70, 60), smoothing=0.0),
    Smoothed("chunks-scale-100", unrelated(70, 60, 20), logit_scale=100.0, smoothing=0.0),
    Smoothed("chunks-scale-minus-100", unrelated(70, 60, 20), logit_scale=-100.0),
]
CLIP = Contrast(
    op="clip_loss", make=make_smoothed, tensors=features, run=run_clip, check=check_clip,
    chunked=SMOOTHED_CHUNKS, small={"CHUNK_COLS": 48, "CHUNK_BYTES": 64 * 64 * 2},
    outputs={
        _cross_entropy.cross_entropy_sums_tile: ["row_parts_ptr", "col_parts_ptr", "sums_ptr"],
        _cross_entropy.cross_entropy_gradient_tile: ["grad_ptr", "sums_ptr"],
        _cross_entropy.begin_sides: [
            "scalars_ptr", "unit_ptr", "row_side_ptr", "row_weight_ptr", "col_side_ptr",
            "col_weight_ptr",
        ],
        **NUMBERED,
        _cross_entropy.begin_counted_sides: [
            "scalars_ptr", "unit_ptr", "row_side_ptr", "row_weight_ptr", "col_side_ptr",
            "col_weight_ptr",
        ],
        _cross_entropy.merge_sums: [
            Updated("row_side_ptr"), "row_log_ptr", Updated("col_side_ptr"), "col_log_ptr",
        ],
        _cross_entropy.finish_cross_entropy: [
            "loss_ptr", "d_scale_ptr", "image_out_ptr", "text_out_ptr",
        ],
    },
    workspace={"grad_ptr": 8192, "row_parts_ptr": 1024},
    gradients=3, offsets=(0, -40, 1000, -1000, 2**40, -(2**40), None),
)
INFO_NCE = replace(
    CLIP, op="info_nce", tensors=query_and_keys, run=run_info_nce, check=check_info_nce,
    outputs=CLIP.outputs | {_cross_entropy.cross_entropy_sums_tile: ["row_parts_ptr", "sums_ptr"]},
)


# itc_loss

def make_problem(rows: int, cols: int, depth: int, **options) -> Problem:
    return Problem(make_case(rows, cols, depth, **options), max(cols // 2, 1))


def run_itc(problem: Problem, tensors, needs=(True, True)):
    parts = [x.double() for x in (tensors["keys"], tensors["queue"]) if x is not None]
    candidates = torch.cat(parts).nan_to_num()
    pairs = matches(tensors["query"], candidates, problem.case.positives).double()
    count = pairs.sum(1).long()
    matched = (pairs @ candidates / count.clamp(min=1).unsqueeze(1)).float()
    return itc_loss.itc_loss(
        tensors["query"], tensors["keys"], torch.tensor(problem.case.logit_scale),
        tensors["queue"], tensors["teacher_query"], torch.tensor(problem.alpha), matched, count,
        *needs,
    )


def exact_itc(tensors):
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def truth_of_itc(problem: Problem, tensors):
    outputs = test_itc_loss.outputs
    return outputs(tw.reference.itc_loss, problem, exact_itc(tensors), torch.float64)


def check_itc(problem: Problem, dtype: torch.dtype, tensors=None):
    tensors = tensors or problem.tensors(dtype)
    ours = dict(zip(("loss", "d_query", "d_scale"), run_itc(problem, tensors), strict=True))
    ours = checked_gradients(ours, dtype, "d_query")
    eager = test_itc_loss.outputs(eager_itc_loss, problem, tensors, dtype)
    magnitudes = test_itc_loss.magnitudes(problem, **exact_itc(tensors))
    assert_within_budget(ours, eager, truth_of_itc(problem, tensors), magnitudes)


ITC = Contrast(
    op="itc_loss", make=make_problem, tensors=Problem.tensors, run=run_itc, check=check_itc,
    chunked=[
        Problem(Case("chunks", related(40, 50, 20)), 20),
        Problem(Case("chunks-aligned", related(32, 64, 16)), 32),
        Problem(Case("chunks-no-teacher", related(70, 50, 20), 14.3), 20, teacher=False),
        Problem(Case("chunks-across", related(40, 31, 20), positives=10), 50),
        Problem(Case("chunks-ids", related(40, 50, 20), positives=ids(40, 70, 40)), 20),
        Problem(Case("chunks-no-queue", related(40, 60, 20)), None),
        Problem(Case("chunks-scale-100", unrelated(40, 50, 20), 100.0), 20),
        Problem(Case("chunks-scale-minus-100", unrelated(40, 50, 20), -100.0), 20),
    ],
    small={"CHUNK_ROWS": 64, "CHUNK_COLS": 48, "CHUNK_BYTES": 64 * 64 * 2},
    outputs={
        itc_loss.itc_sums_tile: ["parts_ptr"],
        itc_loss.merge_parts: ["state_ptr"],
        itc_loss.itc_weights_tile: ["weights_ptr", "rest_ptr", "sums_ptr"],
        itc_loss.finish_queries: [Updated("d_query_ptr"), Updated("terms_ptr")],
        itc_loss.finish_loss: ["loss_ptr", "d_scale_ptr"],
    },
    workspace={"weights_ptr": 12288, "parts_ptr": 2560}, gradients=2,
)


# hard_negatives

def run_negatives(case: Case, tensors, needs=(), row_offset=0, seed=-5):
    scale = torch.tensor(case.logit_scale)
    return hard_negatives.hard_negatives(
        *tensors.values(), scale, *operands(case.positives), torch.tensor(seed), row_offset
    )


def perturbed(case: Case, image, text, row_offset=0, seed=-5):
    """What the largest is sought of: (B, N) float64 for the texts, (N, B) for the images."""
    z = image.double() @ text.double().T * case.logit_scale
    z = z.masked_fill(matches(image, text, case.positives) | z.isnan(), -INF)
    texts, images = (
        z + _philox.gumbel(torch.tensor(seed), *z.shape, row_offset, op=op)
        for op in (_philox.NEGATIVE_TEXTS, _philox.NEGATIVE_IMAGES)
    )
    return texts, images.T


def check_negatives(case: Case, dtype: torch.dtype, row_offset=0):
    """The largest in float64; only what float32 can't tell apart may be swapped."""
    tensors = features(case, dtype)
    found = run_negatives(case, tensors, row_offset=row_offset)
    for index, values in zip(found, perturbed(case, *tensors.values(), row_offset), strict=True):
        assert index.dtype == torch.int64 and index.shape == values.shape[:1]
        if not values.shape[1]:
            assert (index == -1).all()
            continue
        best = values.amax(1)
        assert torch.equal(index == -1, best == -INF)
        index, best, values = (x[best > -INF] for x in (index, best, values))
        deficit = best - values.gather(1, index[:, None])[:, 0]
        assert (deficit <= 1e-5 * (1 + best.abs())).all(), deficit.max()
        assert (deficit > 0).sum() <= 1  # the test's problems have few near ties


NEGATIVES = Contrast(
    op="hard_negatives", make=make_case, tensors=features, run=run_negatives,
    check=check_negatives,
    chunked=[
        Case("chunks", related(150, 130, 20)),
        Case("chunks-aligned", related(128, 192, 16)),
        Case("chunks-offset", related(130, 140, 20), positives=37),
        Case("chunks-negative-offset", related(140, 100, 20), positives=-51),
        Case("chunks-nothing-matches", related(70, 130, 20), positives=None),
        Case("chunks-ids", related(135, 150, 20), positives=ids(135, 150, 60)),
        Case("chunks-two-ids", related(130, 70, 20), positives=ids(130, 70, 2)),
        Case("chunks-scale-100", unrelated(150, 130, 20), logit_scale=100.0),
        Case("chunks-scale-minus-100", unrelated(150, 130, 20), logit_scale=-100.0),
    ],
    small={"CHUNK_ROWS": 128, "CHUNK_COLS": 96, "CHUNK_BYTES": 128 * 96 * 4},
    outputs={
        hard_negatives.negatives_tile: [
            "row_value_ptr", "row_index_ptr", "col_value_ptr", "col_index_ptr",
        ],
        hard_negatives.merge_negatives: [
            Updated(f"{side}_{what}_ptr") for side in ("row", "col") for what in ("best", "at")
        ],
    },
    workspace={"row_value_ptr": 256, "col_value_ptr": 256},
    offsets=(-40, 1000, -1000, 2**63 - 1, -(2**63)),
)

CONTRASTS = {contrast.op: contrast for contrast in (SIGMOID, CLIP, INFO_NCE, ITC, NEGATIVES)}
