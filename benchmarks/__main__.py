"""All CPU benchmarks into one JSON file: python -m benchmarks [--quick] [--only NAME] [--out FILE.json]"""

from .cases import CASES
from .harness import main

main(CASES)
