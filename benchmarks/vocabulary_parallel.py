"""What ranks that share the classes send each other, simulated in one process: python -m benchmarks.vocabulary_parallel

The logits are cut into 8 to 1024 shards. Each goes through the operators that its rank would run, and what they leave
is stacked, as an all-gather stacks it, and finished. Nothing is timed: bytes are counted from the tensors themselves,
errors are the largest over the tokens, relative to float64, beside those of the ordinary function on all classes.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import cece
from cece.ops import WANTED

from .harness import RESULTS

CLASSES, TOKENS, RANKS = 131072, 64, (8, 64, 1024)
LOSSES = {
    "cross_entropy": {},
    "cross_entropy, class weights": {"weighted": True},
    "token_statistics, all": {"full": True},
}


def cut(t, ranks):
    """As torch.chunk cuts, but with the empty shards at the end."""
    each = -(-t.shape[-1] // ranks)
    return [t[..., min(i * each, t.shape[-1]) : (i + 1) * each] for i in range(ranks)]


def error(value, truth):
    return ((value.double() - truth).abs() / truth.abs()).max().item()


def of_rows(logits, labels, weight, ranks, weighted=False, full=False):
    """The numbers that all ranks leave, and the loss; for the loss's error, that of one process."""
    ops, classes = torch.ops.cece, logits.shape[1]
    weight = weight if weighted else None
    shards = cut(logits, ranks)
    weights = cut(weight, ranks) if weighted else [None] * ranks
    first = [sum(s.shape[1] for s in shards[:i]) for i in range(ranks)]
    parts = torch.stack(
        [
            ops.row_parts(x, labels, w, -100, 0.0, 1.0, 0.0, c, classes, full)
            for x, w, c in zip(shards, weights, first, strict=True)
        ]
    )
    wanted = sum(WANTED.values()) if full else WANTED["log_prob"]
    loss = ops.finish_parts(parts, labels, -100, 0.0, False, classes, wanted)[0]
    truth = torch.nn.functional.cross_entropy(
        logits.double(), labels, None if weight is None else weight.double(), reduction="none"
    )
    return parts, error(loss, truth), error(cece.cross_entropy(logits, labels, weight, reduction="none"), truth)


def of_pairs(logits, others, ranks):
    ops = torch.ops.cece
    pairs = zip(cut(logits, ranks), cut(others, ranks), strict=True)
    parts = torch.stack([ops.divergence_forward(x, y, None, 1.0, False)[1][:7] for x, y in pairs])
    truth = cece.kl_divergence(logits.double(), others.double(), reduction="none")
    whole = cece.kl_divergence(logits, others, reduction="none")
    return parts, error(ops.divergence_merge(parts, 1.0)[0], truth), error(whole, truth)


def gathered(classes, ranks, loss):
    return -(-classes // ranks) * (ranks - 1) * (2 if loss == "kl_divergence" else 1)


def measure(classes=CLASSES, tokens=TOKENS, ranks=RANKS):
    torch.manual_seed(0)
    logits = 2 * torch.randn(tokens, classes)
    others = logits + 1e-3 * torch.randn(tokens, classes)
    labels, weight = torch.randint(classes, (tokens,)), torch.rand(classes)
    for n in ranks:
        results = {loss: of_rows(logits, labels, weight, n, **options) for loss, options in LOSSES.items()}
        results["kl_divergence"] = of_pairs(logits, others, n)
        for loss, (parts, here, alone) in results.items():
            yield {
                "loss": loss,
                "ranks": n,
                "leaves": parts[0].nbytes / tokens,  # a rank, a token
                # What a rank sends where messages go round a ring: every part but its neighbour's own; all-reduces of
                # a maximum, a sum and the label's logit (of both rows, and a sum after these); all logits.
                "sends": parts[0].nbytes / tokens * (n - 1),
                "reduces": (40 if loss == "kl_divergence" else 24) * (n - 1) / n,
                "logits_bf16": 2 * gathered(classes, n, loss),
                "logits_f32": 4 * gathered(classes, n, loss),
                "error": here,
                "error_alone": alone,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks-simulated.json")
    args = parser.parse_args()
    rows = []
    for row in measure():
        rows.append(row)
        print(*(f"{name} {value:.3g}" if isinstance(value, float) else value for name, value in row.items()))
    data = {"date": time.strftime("%Y-%m-%d"), "classes": CLASSES, "tokens": TOKENS, "rows": rows}
    args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
