"""InfoNCE: each query finds its key among all keys, tile by tile."""

from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register_loss


def info_nce(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""InfoNCE, one direction: each query must find its key among all keys, without the logits.

    With z_ij = logit_scale * <query_i, key_j> and a target t that shares 1 among the keys that
    match a query (smoothed with 1 / N):

        loss = -mean_i sum_j t_ij log softmax_j(z_ij)

    where the mean runs over the queries that have a match. Keys beyond the queries' own are
    negatives for all of them: mined ones go to the end, `torch.cat([keys, hard_negatives])`.

    Args:
        query: (B, D), float16, bfloat16, float32 or float64. Usually L2-normalised; the loss does
            not normalise.
        keys: (N, D), same dtype and device; usually N >= B.
        logit_scale: one element or a float; 1 / temperature.
        positives: query i matches key i + positives, if there is one. Or a pair of int64 vectors,
            ids of the queries (B,) and of the keys (N,): they match where these are equal; then
            the log-probabilities of a query's keys are averaged. None: nothing matches.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.

    Returns:
        0-d float32 (float64 for float64 features). A batch without a match gives 0.

    Differentiable once in `query`, `keys` and `logit_scale`; a second time only under
    `tw.backend("reference")`. Under autocast the features are cast as for a matrix product, the
    rest stays float32.

    Cost: 4 matrix products of B*N*D (1 when no gradient is needed), memory O((B + N) * D) plus a
    fixed workspace of 18 MiB (34 MiB in float64, 128 MiB on a GPU), whatever B and N.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text.
        RuntimeError: inside a torch.func transform.

    Paper: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018;
    with the batch's other keys as negatives: Henderson et al., Efficient Natural Language Response
    Suggestion for Smart Reply, 2017.
    """
    query, keys = _arguments.features(query=query, keys=keys)
    scale = _arguments.scalar("logit_scale", logit_scale, query)
    offset, query_ids, key_ids = _arguments.matches(
        "positives", positives, query.shape[0], keys.shape[0], query.device
    )
    _arguments.check_between("label_smoothing", label_smoothing, 0, 1)

    op = _backend.operator("info_nce", query.device, query.dtype)
    if op is None:
        return reference.info_nce(
            query, keys, scale, positives=positives, label_smoothing=label_smoothing
        )
    needs = _arguments.needs(query, keys, scale)
    return op(
        query, keys, scale, offset, query_ids, key_ids, float(label_smoothing), *needs
    )[0]


register_loss(
    "info_nce",
    "(Tensor query, Tensor keys, Tensor logit_scale, SymInt? positives, "
    "Tensor? query_ids, Tensor? key_ids, float label_smoothing, "
    "bool need_query, bool need_keys, bool need_scale) "
    "-> (Tensor loss, Tensor d_query, Tensor d_keys, Tensor d_scale)",
    differentiable=("query", "keys", "logit_scale"),
)
