"""Multi-label losses beside what people write. Run: python -m benchmarks.bench_multilabel [--quick] [--only NAME]"""

import torch
import torch.nn.functional as F

from .bench_binary_cross_entropy import truths
from .harness import Case, main


def eager_focal(x, y, alpha=0.25, gamma=2.0, reduction="mean"):
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    missed = 1 - (p * y + (1 - p) * (1 - y))
    loss = (alpha * y + (1 - alpha) * (1 - y)) * ce * missed**gamma
    return loss.mean() if reduction == "mean" else loss


def eager_asymmetric(x, y, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    p = torch.sigmoid(x)
    rest = (1 - p + clip).clamp(max=1)
    loss = y * p.clamp(min=1e-8).log() + (1 - y) * rest.clamp(min=1e-8).log()
    missed = 1 - (p * y + rest * (1 - y))
    return -(loss * missed ** (gamma_pos * y + gamma_neg * (1 - y))).sum()


def eager_masked(x, y, mask):
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return torch.where(mask, loss, 0).sum() / mask.sum()


def eager_smoothed(x, y, label_smoothing):
    return F.binary_cross_entropy_with_logits(x, y * (1 - label_smoothing) + label_smoothing / 2)


def eager_listed(x, labels):
    return F.binary_cross_entropy_with_logits(x, torch.zeros_like(x).scatter_(1, labels, 1.0))


def masks(logits):
    return torch.rand(logits.shape) < 0.7


def twenty_labels(logits):
    return torch.randint(logits.shape[1], (logits.shape[0], 20))


def case(name, loss, eager, *shape, target=truths, **more):
    return Case("multi-label " + name, loss, shape or (8192, 1000), target, eager=eager, **more)


BCE = "binary_cross_entropy_with_logits"
FOCAL = {"options": {"reduction": "mean"}, "must": {"eager": 8, "compile": 2}}

CASES = [
    case("8192 x 1000, focal", "sigmoid_focal_loss", eager_focal, **FOCAL),
    case("8192 x 1000, asymmetric", "asymmetric_loss", eager_asymmetric, must={"eager": 8, "compile": 2}),
    case("8192 x 1000, masked", BCE, eager_masked, options={"mask": masks}),
    case("8192 x 1000, smoothing", BCE, eager_smoothed, options={"label_smoothing": 0.1}),
    case(
        "256 x 50000, 20 labels listed",
        "multilabel_cross_entropy",
        eager_listed,
        256,
        50000,
        target=twenty_labels,
        must={"eager": 10},
    ),
]

if __name__ == "__main__":
    main(CASES)
