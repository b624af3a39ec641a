"""Every case of the CPU benchmark."""

from . import (
    bench_binary_cross_entropy,
    bench_cross_entropy,
    bench_divergence,
    bench_linear,
    bench_multilabel,
    bench_token_statistics,
)

CASES = (
    bench_cross_entropy.CASES
    + bench_token_statistics.CASES
    + bench_linear.CASES
    + bench_divergence.CASES
    + bench_binary_cross_entropy.CASES
    + bench_multilabel.CASES
)
