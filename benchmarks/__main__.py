"""All CPU benchmarks into one JSON file: python -m benchmarks [--quick] [--only NAME] [--out FILE.json]"""

from . import bench_binary_cross_entropy, bench_cross_entropy, bench_multilabel
from .harness import main

main(bench_cross_entropy.CASES + bench_binary_cross_entropy.CASES + bench_multilabel.CASES)
