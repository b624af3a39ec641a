"""Binary cross-entropy cases. Run: python -m benchmarks.bench_binary_cross_entropy [--quick] [--only NAME]"""

import torch

from .harness import Case, main


def truths(logits):
    return torch.randint(2, logits.shape).to(logits.dtype)


def bools(logits):
    return torch.randint(2, logits.shape, dtype=torch.bool)


def probabilities(*shape):
    return torch.randn(*shape).sigmoid()


def pos_weights(logits):
    return torch.rand(logits.shape[1], dtype=torch.float32).add(0.5).to(logits.dtype)


def as_input(logits, target):
    return target.to(logits.dtype)


def case(name, loss="binary_cross_entropy_with_logits", target=truths, **more):
    return Case("BCE " + name, loss, (8192, 1000), target, **more)


BF16 = {"dtype": torch.bfloat16}
POS_WEIGHT = {"options": {"pos_weight": pos_weights}}
PROBABILITIES = {"loss": "binary_cross_entropy", "logits": probabilities}
BOOLS = {"target": bools, "for_torch": as_input}

CASES = [
    case("8192 x 1000", must={"eager": 5, "compile": 2.5, "copy": 3}),
    case("8192 x 1000, pos_weight", must={"eager": 6, "compile": 2.5, "copy": 3}, **POS_WEIGHT),
    case("8192 x 1000, probabilities", must={"eager": 8, "compile": 2.5, "copy": 3}, **PROBABILITIES),
    case("8192 x 1000, bool targets", **BOOLS),
    case("8192 x 1000, bf16", must={"eager": 5, "compile": 3}, **BF16),
    case("8192 x 1000, pos_weight, bf16", **POS_WEIGHT, **BF16),
    case("8192 x 1000, probabilities, bf16", **PROBABILITIES, **BF16),
    case("8192 x 1000, bool targets, bf16", **BOOLS, **BF16),
]

if __name__ == "__main__":
    main(CASES)
