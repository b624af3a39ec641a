"""The cross-entropy family for PyTorch: fused, numerically exact, differentiable every way torch is.

Multi-class    ``cross_entropy(logits, labels)``                            one label a sample
Multi-label    ``binary_cross_entropy_with_logits(logits, truth)``          a yes or no for every class
Binary         either: two logits and a label, or one logit and a truth

``binary_cross_entropy`` takes *probabilities*: like ``torch.nn.BCELoss`` it applies no sigmoid.
"""

import importlib as _importlib
from typing import Any as _Any

from . import _load
from ._load import build_info, empty_cache

_load.load()

from . import ops, reference  # noqa: E402, F401
from ._decompositions import decompositions  # noqa: E402
from ._patch import patch  # noqa: E402
from .divergence import js_divergence, kl_divergence  # noqa: E402
from .functional import (  # noqa: E402
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    check_targets,
    cross_entropy,
)
from .linear import LinearCrossEntropyLoss, linear_cross_entropy, linear_token_statistics  # noqa: E402
from .modules import (  # noqa: E402
    AsymmetricLoss,
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    MultilabelCrossEntropyLoss,
    PairwiseSigmoidLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
)
from .multilabel import (  # noqa: E402
    asymmetric_loss,
    multilabel_cross_entropy,
    pairwise_sigmoid_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from .rows import TokenStatistics, entropy, token_statistics  # noqa: E402

__version__ = build_info()["version"]
__all__ = [
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MultilabelCrossEntropyLoss",
    "PairwiseSigmoidLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "TokenStatistics",
    "asymmetric_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "build_info",
    "check_targets",
    "cross_entropy",
    "decompositions",
    "empty_cache",
    "entropy",
    "js_divergence",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_token_statistics",
    "multilabel_cross_entropy",
    "pairwise_sigmoid_loss",
    "patch",
    "reference",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "token_statistics",
]


def __getattr__(name: str) -> _Any:
    if name == "distributed":  # when it is asked for: it imports torch.distributed
        return _importlib.import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
