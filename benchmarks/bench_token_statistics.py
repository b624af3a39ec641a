"""Statistics of rows, and cross-entropy with options. Run: python -m benchmarks.bench_token_statistics [--quick]"""

import torch
import torch.nn.functional as F

import cece

from .harness import Case, main


def labels(logits):
    return torch.randint(logits.shape[1], logits.shape[:1])


def eager_policy(logits, target):
    """What a policy gradient asks of every token: its log-probability and its entropy."""
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return (log_p.gather(1, target.unsqueeze(1)).squeeze(1) + entropy).mean()


def policy(logits, target):
    s = cece.token_statistics(logits, target, entropy=True)
    return (s.log_prob + s.entropy).mean()


def softcapped(logits, target, z_loss, softcap):
    z = softcap * (logits.float() / softcap).tanh()
    return F.cross_entropy(z, target) + z_loss * z.logsumexp(1).square().mean()


def statistics(name, *shape, must, **more):
    return Case(name, policy, shape, labels, eager=eager_policy, must=must, **more)


GEMMA = {"z_loss": 1e-4, "softcap": 30.0}

CASES = [
    statistics("log_prob and entropy 8192 x 1000", 8192, 1000, must={}),
    statistics("log_prob and entropy 1024 x 32000", 1024, 32000, must={"eager": 8}),
    statistics("log_prob and entropy 1024 x 32000, bf16", 1024, 32000, must={}, dtype=torch.bfloat16),
    Case(
        "CE 1024 x 32000, z-loss and softcap", "cross_entropy", (1024, 32000), labels, eager=softcapped, options=GEMMA
    ),
]

if __name__ == "__main__":
    main(CASES)
