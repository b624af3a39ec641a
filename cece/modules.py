"""The losses as modules: subclasses of ``torch.nn``'s, whose state_dict, pickles and isinstance checks they share."""

import torch
from torch import Tensor

from . import functional, multilabel
from ._script import check_reduction

__all__ = [
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "MultilabelCrossEntropyLoss",
    "PairwiseSigmoidLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
]


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

    Takes *logits* and applies the sigmoid. ``weight`` and ``pos_weight`` are buffers, as in torch. ``forward`` takes
    the function's ``mask`` and ``normalizer`` too.
    """

    __constants__: list[str] = ["reduction", "label_smoothing", "ignore_index", "mean_dim", "poly"]
    label_smoothing: float = 0.0  # also where __init__ was not ours, as above
    ignore_index: int | None = None
    mean_dim: int | None = None
    poly: float = 0.0

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        mean_dim: int | None = None,
        poly: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        check_reduction("BCEWithLogitsLoss", self.reduction)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.mean_dim, self.poly = mean_dim, poly

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            mask=mask,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            mean_dim=self.mean_dim,
            poly=self.poly,
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


class SigmoidFocalLoss(_Shown):
    """:func:`cece.sigmoid_focal_loss` as a module, of *logits*; its reduction is ``'mean'`` if not said otherwise.

    Shapes, dtypes and errors are the function's. ``weight`` is a buffer; ``forward`` takes ``mask`` and ``normalizer``.
    """

    __constants__: list[str] = ["alpha", "gamma", "reduction", "label_smoothing", "poly", "ignore_index", "mean_dim"]
    weight: Tensor | None
    alpha: float
    gamma: float
    reduction: str
    label_smoothing: float
    poly: float
    ignore_index: int | None
    mean_dim: int | None

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        poly: float = 0.0,
        ignore_index: int | None = None,
        mean_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction("SigmoidFocalLoss", reduction)
        self.register_buffer("weight", weight)
        self.alpha, self.gamma, self.reduction = float(alpha), float(gamma), reduction
        self.label_smoothing, self.poly = float(label_smoothing), float(poly)
        self.ignore_index, self.mean_dim = ignore_index, mean_dim

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        return multilabel.sigmoid_focal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            poly=self.poly,
            mask=mask,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            mean_dim=self.mean_dim,
        )


class AsymmetricLoss(_Shown):
    """:func:`cece.asymmetric_loss` as a module, of *logits*; its reduction is the function's, ``'sum'``.

    Shapes, dtypes and errors are the function's. ``weight`` is a buffer; ``forward`` takes ``mask`` and ``normalizer``.
    """

    __constants__: list[str] = [
        "gamma_neg", "gamma_pos", "clip", "reduction", "label_smoothing", "ignore_index", "mean_dim",
    ]  # fmt: skip
    weight: Tensor | None
    gamma_neg: float
    gamma_pos: float
    clip: float
    reduction: str
    label_smoothing: float
    ignore_index: int | None
    mean_dim: int | None

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "sum",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        mean_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction("AsymmetricLoss", reduction)
        self.register_buffer("weight", weight)
        self.gamma_neg, self.gamma_pos, self.clip = float(gamma_neg), float(gamma_pos), float(clip)
        self.reduction, self.label_smoothing = reduction, float(label_smoothing)
        self.ignore_index, self.mean_dim = ignore_index, mean_dim

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        return multilabel.asymmetric_loss(
            input,
            target,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            self.reduction,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            mask=mask,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            mean_dim=self.mean_dim,
        )


class SoftmaxFocalLoss(_Shown):
    """:func:`cece.softmax_focal_loss` as a module, of *logits*. ``weight`` is a buffer."""

    __constants__: list[str] = ["gamma", "ignore_index", "reduction", "poly"]
    weight: Tensor | None
    gamma: float
    ignore_index: int
    reduction: str
    poly: float

    def __init__(
        self,
        weight: Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        poly: float = 0.0,
    ) -> None:
        super().__init__()
        check_reduction("SoftmaxFocalLoss", reduction)
        self.register_buffer("weight", weight)
        self.gamma, self.ignore_index, self.reduction, self.poly = float(gamma), ignore_index, reduction, float(poly)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return multilabel.softmax_focal_loss(
            input,
            target,
            self.weight,
            self.gamma,
            self.ignore_index,
            self.reduction,
            poly=self.poly,
            normalizer=normalizer,
        )


class MultilabelCrossEntropyLoss(_Shown):
    """:func:`cece.multilabel_cross_entropy` as a module, of *logits* and lists of labels.

    Shapes, dtypes and errors are the function's. ``weight`` and ``pos_weight`` are buffers.
    """

    __constants__: list[str] = ["ignore_index", "reduction", "label_smoothing", "mean_dim"]
    weight: Tensor | None
    pos_weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    mean_dim: int | None

    def __init__(
        self,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        mean_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction("MultilabelCrossEntropyLoss", reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.mean_dim = float(label_smoothing), mean_dim

    def forward(
        self,
        input: Tensor,
        labels: Tensor,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        return multilabel.multilabel_cross_entropy(
            input,
            labels,
            offsets,
            self.weight,
            self.pos_weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            mask=mask,
            normalizer=normalizer,
            mean_dim=self.mean_dim,
        )


class PairwiseSigmoidLoss(torch.nn.Module):
    """:func:`cece.pairwise_sigmoid_loss` of embeddings, with SigLIP's two parameters, which learn with the model.

    ``log_scale``, from log 10 on, and ``bias``, from -10 on: at first almost every pair is taken for none, as it is.
    """

    __constants__: list[str] = ["reduction"]
    log_scale: torch.nn.Parameter
    bias: torch.nn.Parameter
    reduction: str

    def __init__(self, scale: float = 10.0, bias: float = -10.0, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction("PairwiseSigmoidLoss", reduction)
        self.log_scale = torch.nn.Parameter(torch.tensor(float(scale)).log())
        self.bias = torch.nn.Parameter(torch.tensor(float(bias)))
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return multilabel.pairwise_sigmoid_loss(input, other, self.log_scale.exp(), self.bias, self.reduction)
