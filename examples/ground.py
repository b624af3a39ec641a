"""The figure of GROUND.md: what a belief costs, over the probability and over the logit.

Every curve is one of cece's losses. Run: python examples/ground.py [--output ground.png]
"""

import argparse
from pathlib import Path

import torch

import cece

HERE = Path(__file__).parent
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#718096"


def of_probability(q: float, points: int = 401) -> dict[str, torch.Tensor]:
    """Over the belief p in (0, 1): cross-entropy, and entropy and divergence, whose sum it is."""
    p = torch.linspace(0.005, 0.995, points, dtype=torch.float64)
    beliefs = torch.stack([p, 1 - p], 1).log()
    truth = torch.tensor([q, 1 - q], dtype=torch.float64).expand_as(beliefs)
    cross = cece.cross_entropy(beliefs, truth, reduction="none")
    return {
        "p": p,
        "cross-entropy": cross,
        "entropy": cece.cross_entropy(truth.log(), truth, reduction="none"),
        "divergence": cece.kl_divergence(beliefs, truth.log(), reduction="none"),
    }


def of_logit(points: int = 401) -> dict[str, torch.Tensor]:
    """Over the logit z: the loss of a yes, of a no, and the slope of the former."""
    z = torch.linspace(-6, 6, points, dtype=torch.float64).requires_grad_()
    yes = cece.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none")
    no = cece.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="none")
    (slope,) = torch.autograd.grad(yes.sum(), z)
    return {"z": z.detach(), "yes": yes.detach(), "no": no.detach(), "slope": slope}


def draw(output: Path, q: float = 0.8) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=100)
    curve = of_probability(q)
    p, cross, floor = curve["p"], curve["cross-entropy"], curve["entropy"]
    left.plot(p, cross, color=BLUE, lw=2)
    left.fill_between(p, 0, floor, color=GREY, alpha=0.25)
    left.fill_between(p, floor, cross, color=RED, alpha=0.25)
    lowest = cross.argmin()
    left.plot(p[lowest], cross[lowest], "o", color=BLUE)
    left.annotate(f"lowest at p = q = {q:g}", (p[lowest], cross[lowest]), (0.42, 1.6), arrowprops={"arrowstyle": "->"})
    left.text(0.2, float(floor[0]) / 2, "entropy H(q): cannot be learned away", va="center")
    left.text(0.02, 0.58, "divergence KL(q || p):\nwhat the wrong belief costs", color=RED, fontsize=8)
    left.text(0.13, 1.95, "cross-entropy H(q, p)", color=BLUE)
    left.set(xlim=(0, 1), ylim=(0, 2.5), xlabel="belief p in yes", ylabel="nats")
    left.set_title(f"Yes comes with probability q = {q:g}")

    curve = of_logit()
    z = curve["z"]
    right.plot(z, curve["yes"], color=BLUE, lw=2, label="loss of a yes: -log sigmoid(z)")
    right.plot(z, curve["no"], color=RED, lw=2, label="loss of a no: -log sigmoid(-z)")
    right.plot(z, curve["slope"], color=BLUE, ls="--", lw=1, label="slope of a yes: p - 1")
    right.axhline(0, color=GREY, lw=0.8)
    right.set(xlim=(-6, 6), ylim=(-1.2, 6.2), xlabel="logit z", ylabel="nats")
    right.set_title("The same over the logit")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "ground.png", help="the picture (default: %(default)s)")
    draw(parser.parse_args().output)
