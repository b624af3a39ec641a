"""Divergences of two distributions a row, each given by logits: what a student's differs from a teacher's by."""

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _script
from ._arguments import as_divisor, as_float, check_dim, check_tensors, dtensor_among
from ._script import scripted_as

__all__ = ["js_divergence", "kl_divergence"]


def _check(loss: str, required: dict[str, object], optional: dict[str, object], temperature: Any) -> float:
    """Types; returns the temperature as a float."""
    check_tensors(loss, required, optional)
    return temperature if type(temperature) is float else as_float(loss, "temperature", temperature)


@scripted_as(_script.kl_divergence)
def kl_divergence(
    logits: Tensor,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    tail: str = "lump",
    dim: int = 1,
) -> Tensor:
    """Kullback-Leibler divergence ``KL(q || p) = sum_j q_j (log q_j - log p_j)`` of two rows of *logits*.

    ``p = softmax(logits / temperature)`` is the model's, ``q = softmax(target_logits / temperature)`` the target's, a
    teacher's. Neither is to be normalised before: log-probabilities are logits too. The result is not multiplied by
    ``temperature ** 2``, as some distillation recipes do to keep the gradient's size.

    A divergence of 1e-12 nats is right to 1e-6 of itself in float32, also where the two rows differ by an offset. A
    class with ``q_j = 0`` (a target logit of -inf) costs nothing; one with ``p_j = 0`` (a logit of -inf) and a finite
    target logit makes the divergence infinite.

    With ``target_indices`` the teacher is known by its k best classes only: ``target_logits`` are then their
    *log-probabilities* at this temperature, of which the rest of the probability, the tail's, is what is missing to 1.

    Args:
        logits: shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float64, float32, float16 or bfloat16; any
            strides, without a copy.
        target_logits: logits' shape, any of these dtypes. With target_indices: shape ``(K)``, ``(N, K)`` or ``(N, K,
            d1, ..., dk)``, log-probabilities; only with ``tail="renormalize"`` may they lack a constant.
        temperature: what the logits are divided by, above 0. Log-probabilities of a top-k teacher are divided by it
            with ``tail="renormalize"`` only.
        reduction: ``'none'``: a value a row, shape ``()``, ``(N)`` or ``(N, d1, ..., dk)``; ``'sum'`` over all rows;
            ``'mean'`` over all rows (torch's kl_div divides by all elements instead); ``'batchmean'``: the sum divided
            by N, the size of the first dimension (1 without a batch).
        mask: bool, shape of the rows. Rows where it is False have value and gradient 0, whatever is in them, and do not
            count in the mean.
        token_weight: a factor for each row, shape of the rows. It does not count in the mean.
        normalizer: a number or a tensor of one, which ``'mean'`` divides by instead of the number of rows. Never
            synced.
        target_indices: int64, target_logits' shape: the classes that target_logits are of, no class twice in a row.
        dim: the dimension of the classes (of one row, the only one); -1 for ``(batch, sequence, C)``.
        tail: of a top-k teacher. ``'lump'``: all other classes are one, of both rows. ``'renormalize'``: the teacher's
            k probabilities are made to add up to 1. ``'ignore'``: the k terms of the sum as they are, which may come
            out negative. Any of them costs a float32 copy of the logits, in which the k are struck out, and its
            gradient.

    Returns:
        The divergence in nats, float32 (float64 if logits or target_logits are). Differentiable in both.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0, an unknown reduction or tail, a normalizer
            without ``'mean'``.
        RuntimeError: any other shape, dtype or device that does not fit, a target index that is no class (on a CPU).
        TypeError: an argument of the wrong type.

    Source: Kullback and Leibler (1951); Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network".
    """
    if has_torch_function_variadic(logits, target_logits, mask, token_weight, normalizer, target_indices):
        return handle_torch_function(
            kl_divergence,
            (logits, target_logits, mask, token_weight, normalizer, target_indices),
            logits,
            target_logits,
            temperature=temperature,
            reduction=reduction,
            mask=mask,
            token_weight=token_weight,
            normalizer=normalizer,
            target_indices=target_indices,
            tail=tail,
            dim=dim,
        )
    required: dict[str, object] = {"logits": logits, "target_logits": target_logits}
    optional: dict[str, object] = {"mask": mask, "token_weight": token_weight, "target_indices": target_indices}
    temperature = _check("kl_divergence", required, optional, temperature)
    dim = check_dim("kl_divergence", logits, dim)
    normalizer = as_divisor("kl_divergence", normalizer)
    if dtensor := dtensor_among(logits, target_logits, mask, token_weight, target_indices):
        options = {} if target_indices is None else {"tail": tail}
        return dtensor.pair(
            "kl_divergence",
            (logits, target_logits, mask, token_weight, target_indices),
            dim,
            reduction,
            normalizer,
            temperature=temperature,
            **options,
        )
    return _script.kl_divergence(
        logits, target_logits, temperature, reduction, mask, token_weight, normalizer, target_indices, tail, dim
    )


@scripted_as(_script.js_divergence)
def js_divergence(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    dim: int = 1,
) -> Tensor:
    """Jensen-Shannon divergence ``(KL(p || m) + KL(q || m)) / 2`` of two rows of *logits*, ``m = (p + q) / 2``.

    ``p = softmax(logits / temperature)`` and ``q = softmax(other_logits / temperature)`` may change places. It is at
    most log 2, also where each rules out what the other is sure of, and as exact for small values as
    :func:`kl_divergence`, whose arguments, reductions and errors it has.

    Args:
        logits: shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float64, float32, float16 or bfloat16.
        other_logits: logits' shape, any of these dtypes.
        temperature: what the logits are divided by, above 0. The result is not multiplied by its square.
        reduction: ``'none'``: a value a row; ``'sum'``; ``'mean'`` over all rows; ``'batchmean'``: the sum over N.
        mask: bool, shape of the rows: where False, value and gradient are 0 and the row does not count in the mean.
        token_weight: a factor for each row, shape of the rows. It does not count in the mean.
        normalizer: a number or a tensor of one, which ``'mean'`` divides by instead of the number of rows.
        dim: the dimension of the classes (of one row, the only one); -1 for ``(batch, sequence, C)``.

    Returns:
        The divergence in nats, float32 (float64 if one of the logits are). Differentiable in both.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`kl_divergence`.

    Source: Lin (1991), "Divergence Measures Based on the Shannon Entropy".
    """
    if has_torch_function_variadic(logits, other_logits, mask, token_weight, normalizer):
        return handle_torch_function(
            js_divergence,
            (logits, other_logits, mask, token_weight, normalizer),
            logits,
            other_logits,
            temperature=temperature,
            reduction=reduction,
            mask=mask,
            token_weight=token_weight,
            normalizer=normalizer,
            dim=dim,
        )
    required: dict[str, object] = {"logits": logits, "other_logits": other_logits}
    optional: dict[str, object] = {"mask": mask, "token_weight": token_weight}
    temperature = _check("js_divergence", required, optional, temperature)
    dim = check_dim("js_divergence", logits, dim)
    normalizer = as_divisor("js_divergence", normalizer)
    if dtensor := dtensor_among(logits, other_logits, mask, token_weight):
        tensors = (logits, other_logits, mask, token_weight, None)
        return dtensor.pair("js_divergence", tensors, dim, reduction, normalizer, temperature=temperature)
    return _script.js_divergence(logits, other_logits, temperature, reduction, mask, token_weight, normalizer, dim)
