"""Cross-entropy cases. Run: python -m benchmarks.bench_cross_entropy [--quick] [--only NAME] [--out FILE.json]"""

import torch

from .harness import Case, main


def labels(logits):
    return torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:])


def probabilities(logits):
    return torch.rand_like(logits).softmax(1)


def weights(logits):
    return torch.rand(logits.shape[1]) + 0.5


def channels_last(*shape):
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def case(name, *shape, must, target=labels, **more):
    return Case("CE " + name, "cross_entropy", shape, target, must=must, **more)


VOCABULARY = {"eager": 8, "compile": 6, "copy": 1.8}
CLASSES = {"eager": 5, "compile": 3, "copy": 2}
PIXELS = {"eager": 5, "compile": 3, "copy": 3}

CASES = [
    case("128 x 10", 128, 10, must={"eager": 1}),
    case("65536 x 10", 65536, 10, must={"eager": 1.5}),
    case("8192 x 1000", 8192, 1000, must=CLASSES),
    case("8192 x 1000, weight", 8192, 1000, must=CLASSES, options={"weight": weights}),
    case("8192 x 1000, smoothing", 8192, 1000, must=CLASSES, options={"label_smoothing": 0.1}),
    case("8192 x 1000, soft targets", 8192, 1000, must={"eager": 4, "compile": 1.8}, target=probabilities),
    case("1024 x 32000", 1024, 32000, must=VOCABULARY),
    case("1024 x 32000, bf16", 1024, 32000, must={"eager": 5, "compile": 3}, dtype=torch.bfloat16),
    case("512 x 128256", 512, 128256, must=VOCABULARY),
    case("1 x 4000000", 1, 4000000, must={"eager": 3}),
    case("8 x 21 x 256 x 256", 8, 21, 256, 256, must=PIXELS),
    case("8 x 21 x 256 x 256, channels_last", 8, 21, 256, 256, must=PIXELS, logits=channels_last),
]

if __name__ == "__main__":
    main(CASES)
