"""Divergence cases. Run: python -m benchmarks.bench_divergence [--quick] [--only NAME] [--out FILE.json]"""

import torch
import torch.nn.functional as F

from .harness import Case, main


def eager_kl(logits, target_logits, temperature=1.0):
    log_p, log_q = ((t / temperature).log_softmax(1) for t in (logits, target_logits))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def eager_js(logits, other_logits):
    log_p, log_q = logits.log_softmax(1), other_logits.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(1).mean() / 2


def case(name, loss, *shape, eager, must, **more):
    return Case(name, loss, shape, torch.randn_like, eager=eager, must=must, **more)


CASES = [
    case("KL 128 x 10", "kl_divergence", 128, 10, eager=eager_kl, must={}),
    case("KL 8192 x 1000", "kl_divergence", 8192, 1000, eager=eager_kl, must={}),
    case("KL 1024 x 32000", "kl_divergence", 1024, 32000, eager=eager_kl, must={"eager": 5}),
    case("KL 1024 x 32000, bf16", "kl_divergence", 1024, 32000, eager=eager_kl, must={}, dtype=torch.bfloat16),
    case("KL 512 x 128256", "kl_divergence", 512, 128256, eager=eager_kl, must={"eager": 5}),
    case("JS 1024 x 32000", "js_divergence", 1024, 32000, eager=eager_js, must={"eager": 5}),
]

if __name__ == "__main__":
    main(CASES)
