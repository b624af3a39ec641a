"""A user's program for mypy --strict and pyright (`make lint`); what they must refuse is marked to be ignored.

Both also refuse a mark that is not needed, and so prove that they see the annotations.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

import torch
from typing_extensions import assert_type

import cece

logits, labels, truth = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,)), torch.rand(6, 5)
weight: torch.Tensor | None = torch.rand(5)
assert_type(cece.cross_entropy(logits, labels, weight, label_smoothing=0.1, inplace_backward=False), torch.Tensor)
assert_type(cece.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight), torch.Tensor)
assert_type(cece.binary_cross_entropy(logits.sigmoid(), truth, reduction="sum"), torch.Tensor)
assert_type(cece.kl_divergence(logits, logits.detach(), temperature=2, reduction="batchmean"), torch.Tensor)
assert_type(cece.js_divergence(logits, truth, mask=labels > 1, normalizer=3.0), torch.Tensor)
assert_type(cece.linear_cross_entropy(logits, torch.rand(9, 5), labels, z_loss=0.1, normalizer=6), torch.Tensor)
assert_type(cece.linear_token_statistics(logits, torch.rand(9, 5), labels).log_prob, torch.Tensor | None)
assert_type(cece.LinearCrossEntropyLoss(5, 9, bias=True).forward(logits, labels), torch.Tensor)
assert_type(cece.binary_cross_entropy_with_logits(logits, truth, mask=truth > 0, normalizer=3), torch.Tensor)
assert_type(cece.sigmoid_focal_loss(logits, truth, 0.25, 2, "mean", ignore_index=None), torch.Tensor)
assert_type(cece.asymmetric_loss(logits, truth, gamma_neg=4, reduction="mean", mean_dim=1), torch.Tensor)
assert_type(cece.multilabel_cross_entropy(logits, labels, normalizer=torch.tensor(3)), torch.Tensor)
assert_type(cece.pairwise_sigmoid_loss(logits, truth, scale=weight, bias=-10.0), torch.Tensor)
assert_type(cece.SoftmaxFocalLoss(weight).forward(logits, labels), torch.Tensor)
cece.check_targets(labels, num_classes=5, ignore_index=3)
modules: list[torch.nn.Module] = [cece.CrossEntropyLoss(weight), cece.BCEWithLogitsLoss(), cece.BCELoss(weight)]
assert_type(cece.CrossEntropyLoss(ignore_index=3).forward(logits, labels), torch.Tensor)
with cece.patch() as patch:
    assert_type(patch.calls["cross_entropy"], dict[str, int])
version: str = cece.__version__


def refused() -> None:
    cece.cross_entropy(logits, [1, 2])  # type: ignore
    cece.cross_entropy(logits, labels, ignore_index=None)  # type: ignore
    cece.binary_cross_entropy_with_logits(logits, truth, pos_weight=2.0)  # type: ignore
    cece.CrossEntropyLoss(weight, None, -100, None, "mean", 0.0, True)  # type: ignore
