"""The losses of DTensors: each rank runs the ordinary function on its part, one all-reduce adds what rows sum to.

Any dimension may be sharded. Where it is that of the classes, the ordinary function is ``cece.distributed``'s, of the
ranks along that dimension of the mesh. What is a partial sum is added up first. A rank never takes a mean of its own:
shards may be uneven, empty or all ignored, so means could not be averaged.
Only a call with a DTensor imports this module, which imports torch.distributed.
"""

import functools
import math

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import distributed, divergence, functional, linear
from . import rows as rows_
from ._script import check_choice, over
from .ops import BCE, CROSS_ENTROPY, MEAN, NONE, SUM, label_weights

# Each dimension of an argument has a label: the number of the rows' dimension that it is, CLASSES, or None where it is
# broadcast. What else there is (features, say) is never left cut.
CLASSES, FEATURES = "classes", "features"


class Placed:
    """A call's tensors on a mesh, of whose dimensions each cuts what one label names, or nothing.

    tensors: name -> (tensor, labels). As the leading ones are cut the others are made to be.
    """

    def __init__(self, loss, tensors, leading=("input",), may_cut_classes=True):
        self.loss = loss
        first, self.mesh = next((n, t.device_mesh) for n, (t, _) in tensors.items() if isinstance(t, DTensor))
        self.sizes = {}
        for t, labels in (tensors[name] for name in leading):
            self.sizes |= dict(zip(labels, t.shape, strict=False))
        self.cuts = [None] * self.mesh.ndim
        if all(self._fits(*argument) for argument in tensors.values()):
            for t, labels in (tensors[name] for name in leading):
                self._cut_as(t, labels, may_cut_classes)
        self.tensors = {
            name: (self._as_dtensor(name, t, first, labels), labels) for name, (t, labels) in tensors.items()
        }

    def _fits(self, t, labels):
        """Where shapes disagree nothing is left cut: each rank then raises, and the same."""
        sizes = [1 if label is None else self.sizes.get(label) for label in labels]
        return t is None or list(t.shape) == sizes

    def _cut_as(self, t, labels, classes):
        for i, p in enumerate(t.placements if isinstance(t, DTensor) else ()):
            label = labels[p.dim] if type(p) is Shard else None
            once = label == CLASSES and classes and CLASSES not in self.cuts
            if self.cuts[i] is None and (once or isinstance(label, int)):
                self.cuts[i] = label

    def _as_dtensor(self, name, t, first, labels):
        """On torch's terms: plain tensors where its own losses take them, as those that every rank has. Within
        loss_parallel, they may be beside cut classes where nothing of their own is cut."""
        if isinstance(t, DTensor):
            if t.device_mesh != self.mesh:
                raise RuntimeError(
                    f"cece.{self.loss}: {name} must be on {first}'s mesh {self.mesh}, got {t.device_mesh}"
                )
            return t
        if t is None:
            return None
        whole = CLASSES in self.cuts and not any(cut in labels for cut in self.cuts if cut not in (None, CLASSES))
        if isinstance(t, torch.Tensor) and (
            whole or t.numel() == 1 or DTensor._op_dispatcher._allow_implicit_replication
        ):
            return DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim)
        raise RuntimeError(
            f"cece.{self.loss}: got mixed torch.Tensor and DTensor: {name} must be a DTensor, as {first} is, got"
            f" {type(t).__name__}; torch.distributed.tensor.distribute_tensor makes it one"
        )

    def _placements(self, labels, other_rows=None):
        """The cuts in the dimensions of an argument; `other_rows` where it lacks the dimension of rows that is cut."""

        def placement(cut):
            if cut is not None and cut in labels:
                return Shard(labels.index(cut))
            return Replicate() if cut in (None, CLASSES) or other_rows is None else other_rows

        return [placement(cut) for cut in self.cuts]

    def local(self, name, labels=None):
        """What this rank needs of an argument. Its gradient is summed over the ranks that have other rows, and placed
        as the argument is. Ranks that have other classes of the same rows all have the same one."""
        t, own = self.tensors[name]
        if t is None:
            return None
        labels = own if labels is None else labels
        t = t.redistribute(placements=self._placements(labels))
        return t.to_local(grad_placements=self._placements(labels, Partial()))

    def locals(self):
        return [self.local(name) for name in self.tensors]

    def function(self, one, several):
        """The function of a rank's part."""
        if CLASSES not in self.cuts:
            return one
        group = self.mesh.get_group(self.cuts.index(CLASSES))
        return functools.partial(several, group=group, classes=self.sizes[CLASSES])

    # ---- results

    def _dtensor(self, local, placements, **shape):
        """from_local alone has no second derivative where the gradient arrives placed otherwise; redistribute has."""
        return DTensor.from_local(local, self.mesh, placements, **shape).redistribute(placements=placements)

    def rows(self, local, labels):
        shape = torch.Size([self.sizes[label] for label in labels])
        stride = torch.empty(shape, device="meta").stride()
        return self._dtensor(local, self._placements(labels), shape=shape, stride=stride)

    def sum(self, local):
        """The sum over all ranks' rows, on every rank. Stacked: from_local as Partial has a wrong second derivative."""
        stacked = self._dtensor(local.unsqueeze(0), self._placements((), Shard(0)))
        return stacked.sum(0).redistribute(placements=[Replicate()] * self.mesh.ndim)

    def count(self, labels):
        return math.prod(self.sizes[label] for label in labels)

    def mean(self, loss, labels, normalizer, counts):
        """From the rank's sum. counts: what a mean divides by is the sum of these of all ranks, or all rows."""
        if normalizer is not None:
            if isinstance(normalizer, torch.Tensor) and not isinstance(normalizer, DTensor):
                normalizer = DTensor.from_local(normalizer, self.mesh, [Replicate()] * self.mesh.ndim)
            return over(self.sum(loss), normalizer)
        if counts is None:
            return self.sum(loss) / self.count(labels)
        loss, total = self.sum(torch.stack([loss, counts.sum().to(loss.dtype)]))
        return loss / total

    def reduced(self, loss, labels, reduction, normalizer=None, counts=None):
        """Of a rank's rows, or of their sum; counts: called for a mean."""
        if normalizer is not None and reduction != MEAN:
            raise ValueError(f"cece.{self.loss}: normalizer is what 'mean' divides by, got it with another reduction")
        if reduction == NONE:
            return self.rows(loss, labels)
        return self.mean(loss, labels, normalizer, counts and counts()) if reduction == MEAN else self.sum(loss)


def _locally(reduction):
    return "none" if reduction in (NONE, "none") else "sum"


# ---- rows


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, token_weight, normalizer, **options):
    every, rows = _labels(input, 1)
    soft = target.dim() == input.dim()
    p = Placed(
        "cross_entropy",
        {
            "input": (input, every),
            "target": (target, every if soft else rows),
            "weight": (weight, [CLASSES]),
            "token_weight": (token_weight, rows),
        },
    )
    logits, target, weight, token_weight = p.locals()
    if CLASSES not in p.cuts and not options and token_weight is None:
        number = NONE if reduction == NONE else SUM
        loss = CROSS_ENTROPY(logits, target, weight, number, ignore_index, label_smoothing)[0]
    else:
        f = p.function(functional.cross_entropy, distributed.cross_entropy)
        loss = f(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=_locally(reduction),
            label_smoothing=label_smoothing,
            token_weight=token_weight,
            **options,
        )

    def counts():
        alive = None
        if options.get("skip_masked_rows"):
            f = p.function(rows_.token_statistics, distributed.token_statistics)
            alive = f(logits.detach(), logsumexp=True).logsumexp > -math.inf
        if soft:
            return alive
        shares = label_weights(target, p.local("weight", [None]), ignore_index, loss.dtype)
        return shares if alive is None else torch.where(alive, shares, 0)

    return p.reduced(loss, rows, reduction, normalizer, counts)


def token_statistics(logits, target, dim, **asked):
    every, rows = _labels(logits, dim)
    p = Placed("token_statistics", {"logits": (logits, every), "target": (target, rows)}, ["logits"])
    f = p.function(rows_.token_statistics, distributed.token_statistics)
    found = f(*p.locals(), dim=dim, **asked)
    return type(found)(*(None if t is None else p.rows(t, rows) for t in found))


def pair(name, tensors, dim, reduction, normalizer, **options):
    logits, other, mask, token_weight, target_indices = tensors
    check_choice(name, "reduction", reduction, ["none", "mean", "batchmean", "sum"])
    every, rows = _labels(logits, dim)
    of_other = every if target_indices is None else [FEATURES if n == CLASSES else n for n in every]
    whole = name == "js_divergence" or target_indices is not None  # nobody has a part of these
    p = Placed(
        name,
        {
            "logits": (logits, every),
            "other_logits" if name == "js_divergence" else "target_logits": (other, of_other),
            "mask": (mask, rows),
            "token_weight": (token_weight, rows),
            "target_indices": (target_indices, of_other),
        },
        ["logits"] if target_indices is None else ["logits", "target_indices"],
        may_cut_classes=not whole,
    )
    x, y, mask, token_weight, indices = p.locals()
    if indices is not None:
        options["target_indices"] = indices
    f = getattr(divergence, name) if whole else p.function(divergence.kl_divergence, distributed.kl_divergence)
    loss = f(x, y, mask=mask, token_weight=token_weight, reduction=_locally(reduction), dim=dim, **options)
    if reduction == "batchmean":
        return p.sum(loss) / (p.sizes[rows[0]] if rows else 1)
    number = {"none": NONE, "mean": MEAN, "sum": SUM}[reduction]
    return p.reduced(loss, rows, number, normalizer, lambda: mask)


def _labels(logits, dim):
    """Of logits with the classes in dimension `dim`, and of their rows."""
    rows = list(range(logits.dim() - 1))
    every = rows.copy()
    every.insert(dim % max(1, logits.dim()), CLASSES)
    return every, rows


# ---- rows behind a matrix


def _behind(name, input, linear_weight, linear_bias, target, **tensors):
    """Their placement, and the labels of the results. linear_weight says how classes are cut, input how rows are."""
    before = list(range(input.dim() - 1))
    within = list(range(len(before), len(before) + linear_weight.dim() - 2))  # (C, d1, ..., in)
    soft = target is not None and target.dim() == len(before) + 1 + len(within)
    rows, classes = [*before, *within], [CLASSES, *within]
    p = Placed(
        name,
        {
            "input": (input, [*before, FEATURES]),
            "linear_weight": (linear_weight, [*classes, FEATURES]),
            "target": (target, [*before, *classes] if soft else rows),
            "linear_bias": (linear_bias, classes),
            **{name: (t, [CLASSES] if name == "weight" else rows) for name, t in tensors.items()},
        },
        ["linear_weight", "input"],
    )
    return p, rows, soft


def linear_cross_entropy(
    input, linear_weight, target, linear_bias, weight, token_weight, reduction, normalizer, ignore_index, **options
):
    name = "linear_cross_entropy"
    p, rows, soft = _behind(name, input, linear_weight, linear_bias, target, weight=weight, token_weight=token_weight)
    if options.get("skip_masked_rows") and reduction == MEAN and normalizer is None:
        raise NotImplementedError(
            f"cece.{name}: skip_masked_rows of DTensors needs a normalizer for 'mean', or another reduction"
        )
    input, linear_weight, target, linear_bias, weight, token_weight = p.locals()
    loss = p.function(linear.linear_cross_entropy, distributed.linear_cross_entropy)(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
        reduction=_locally(reduction),
        ignore_index=ignore_index,
        **options,
    )

    def counts():
        if soft:
            return None
        return label_weights(
            target, p.local("weight", [None]), -100 if ignore_index is None else ignore_index, loss.dtype
        )

    return p.reduced(loss, rows, reduction, normalizer, counts)


def linear_token_statistics(input, linear_weight, target, linear_bias, **asked):
    p, rows, _ = _behind("linear_token_statistics", input, linear_weight, linear_bias, target)
    input, linear_weight, target, linear_bias = p.locals()
    f = p.function(linear.linear_token_statistics, distributed.linear_token_statistics)
    found = f(input, linear_weight, target, linear_bias=linear_bias, **asked)
    return type(found)(*(None if t is None else p.rows(t, rows) for t in found))


# ---- elements


def binary_cross_entropy(name, input, target, weight, pos_weight, kind, reduction, parameters=()):
    every = list(range(input.dim()))

    def labels(t):
        return (
            [] if t is None else [None if n == 1 and d >= 0 else d for d, n in enumerate(t.shape, len(every) - t.dim())]
        )

    p = Placed(
        name,
        {
            "input": (input, every),
            "target": (target, every),
            "weight": (weight, labels(weight)),
            "pos_weight": (pos_weight, labels(pos_weight)),
        },
    )
    loss = BCE(*p.locals(), kind, NONE if reduction == NONE else SUM, None, parameters)
    return p.reduced(loss, every, reduction)
