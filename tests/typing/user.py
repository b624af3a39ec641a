"""A user's program, for mypy --strict and pyright (`make lint`): every public name, and what it gives."""

from typing import assert_type

import torch

import cece

logits, labels = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
weight: torch.Tensor | None = torch.rand(5)
assert_type(cece.cross_entropy(logits, labels, weight, label_smoothing=0.1, inplace_backward=False), torch.Tensor)
assert_type(cece.binary_cross_entropy_with_logits(logits, logits.sigmoid(), pos_weight=weight), torch.Tensor)
assert_type(cece.binary_cross_entropy(logits.sigmoid(), logits.sigmoid(), reduction="sum"), torch.Tensor)
assert_type(cece.check_targets(labels, num_classes=5, ignore_index=3), None)
for loss in (cece.CrossEntropyLoss(weight, ignore_index=3), cece.BCEWithLogitsLoss(), cece.BCELoss(reduction="none")):
    module: torch.nn.Module = loss
    assert_type(loss.reduction, str)
    assert_type(loss.forward(logits, labels), torch.Tensor)
with cece.patch() as patch:
    assert_type(patch.calls["cross_entropy"], dict[str, int])
patch.unpatch()
version: str = cece.__version__
