"""The losses as modules: subclasses of ``torch.nn``'s, whose state_dict, pickles and isinstance checks they share."""

import torch

from . import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`cece.cross_entropy` as a module, a drop-in for :class:`torch.nn.CrossEntropyLoss`. Takes logits.

    Shapes, dtypes and errors are the function's. ``weight`` is a buffer, as in torch.
    """

    def __init__(
        self, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, inplace_backward=False
    ):
        functional._reduction("CrossEntropyLoss", reduction)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input, target):
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
        )


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:func:`cece.binary_cross_entropy_with_logits` as a module, a drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    Takes *logits* and applies the sigmoid. ``weight`` and ``pos_weight`` are buffers, as in torch.
    """

    def __init__(self, weight=None, *, reduction="mean", pos_weight=None):
        functional._reduction("BCEWithLogitsLoss", reduction)
        super().__init__(weight, reduction=reduction, pos_weight=pos_weight)

    def forward(self, input, target):
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class BCELoss(torch.nn.BCELoss):
    """:func:`cece.binary_cross_entropy` as a module, a drop-in for :class:`torch.nn.BCELoss`.

    Takes *probabilities* and applies **no** sigmoid, whatever a tutorial says: for logits use
    :class:`BCEWithLogitsLoss`. ``weight`` is a buffer, as in torch.
    """

    def __init__(self, weight=None, *, reduction="mean"):
        functional._reduction("BCELoss", reduction)
        super().__init__(weight, reduction=reduction)

    def forward(self, input, target):
        return functional.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)
