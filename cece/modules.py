"""The losses as modules: subclasses of ``torch.nn``'s, whose state_dict, pickles and isinstance checks they share."""

import torch
from torch import Tensor

from . import functional
from ._script import check_reduction

__all__ = ["BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss"]


class _Shown(torch.nn.Module):
    """repr with all that decides the loss: the buffers' shapes, the options' values."""

    __constants__: list[str]

    def extra_repr(self) -> str:
        buffers = {name: None if b is None else tuple(b.shape) for name, b in self._buffers.items()}
        options = {name: getattr(self, name) for name in self.__constants__}
        return ", ".join(f"{name}={value!r}" for name, value in {**buffers, **options}.items())


class CrossEntropyLoss(_Shown, torch.nn.CrossEntropyLoss):
    """:func:`cece.cross_entropy` as a module, a drop-in for :class:`torch.nn.CrossEntropyLoss`. Takes logits.

    Shapes, dtypes and errors are the function's. ``weight`` is a buffer, as in torch. What changes from step to step,
    token_weight and normalizer, is an argument of the call: ``loss(logits, target, normalizer=n)``.
    """

    __constants__: list[str] = [
        "ignore_index",
        "reduction",
        "label_smoothing",
        "inplace_backward",
        "z_loss",
        "logit_scale",
        "softcap",
        "skip_masked_rows",
    ]
    # Also where __init__ was not ours: a subclass that calls torch's, a module of torch's
    inplace_backward: bool = False
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    skip_masked_rows: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        skip_masked_rows: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check_reduction("CrossEntropyLoss", self.reduction)
        self.inplace_backward, self.skip_masked_rows = inplace_backward, skip_masked_rows
        self.z_loss, self.logit_scale, self.softcap = z_loss, logit_scale, softcap

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            token_weight=token_weight,
            normalizer=normalizer,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            skip_masked_rows=self.skip_masked_rows,
        )


class BCEWithLogitsLoss(_Shown, torch.nn.BCEWithLogitsLoss):
    """:func:`cece.binary_cross_entropy_with_logits` as a module, a drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    Takes *logits* and applies the sigmoid. ``weight`` and ``pos_weight`` are buffers, as in torch.
    """

    __constants__: list[str] = ["reduction"]

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        check_reduction("BCEWithLogitsLoss", self.reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class BCELoss(_Shown, torch.nn.BCELoss):
    """:func:`cece.binary_cross_entropy` as a module, a drop-in for :class:`torch.nn.BCELoss`.

    Takes *probabilities* and applies **no** sigmoid, whatever a tutorial says: for logits use
    :class:`BCEWithLogitsLoss`. ``weight`` is a buffer, as in torch.
    """

    __constants__: list[str] = ["reduction"]

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        check_reduction("BCELoss", self.reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)
