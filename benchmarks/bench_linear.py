"""Linear cross-entropy cases. Run: python -m benchmarks.bench_linear [--quick] [--only NAME] [--out FILE.json]

The limit is `three matmuls`: logits, and from a gradient of their size the gradients of input and weight, with nothing
between them. Each is one call of torch's that returns a new tensor; all three are in `backward`'s column but the first.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import cece

from . import harness


@dataclass(frozen=True)
class LinearCase:
    name: str
    rows: int
    features: int
    classes: int
    dtype: torch.dtype = torch.float32
    ignored: float = 0.0  # the part of the rows without a label
    must: dict = field(default_factory=dict)
    loss: str = "linear_cross_entropy"

    def tensors(self):
        torch.manual_seed(0)
        x = torch.randn(self.rows, self.features).to(self.dtype)
        w = (torch.randn(self.classes, self.features) * self.features**-0.5).to(self.dtype)
        t = torch.randint(self.classes, (self.rows,))
        t[: int(self.ignored * self.rows)] = -100
        return x, w, t

    def kinds(self):
        kinds = dict(CONTENDERS)
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch < 2.13
            del kinds["torch chunked"]
        return kinds

    def moved(self, x, w, t):
        # The matrix products read and write the logits, or what a chunk of them is, twice each way.
        logits = self.rows * self.classes * self.dtype.itemsize
        return {"forward": logits, "backward": 2 * logits, "both": 3 * logits}


class Step(harness.Step):
    def __init__(self, case, x, w, t):
        self.x, self.w, self.target = x.clone().requires_grad_(), w.clone().requires_grad_(), t
        self.source = x
        self.loss = self.make_loss()

    def prepare(self):
        pass

    def forward(self):
        return self.loss(self.x, self.w, self.target)

    def backward(self, loss):
        loss.backward()
        self.x.grad = self.w.grad = None


class Cece(Step):
    def make_loss(self):
        return cece.linear_cross_entropy


class Eager(Step):
    def make_loss(self):
        return lambda x, w, t: F.cross_entropy(F.linear(x, w), t)


class Compiled(Eager):
    def make_loss(self):
        torch._dynamo.reset()
        return torch.compile(super().make_loss(), fullgraph=True, dynamic=False)


class Chunked(Step):
    def make_loss(self):
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)


class Matmuls(Step):
    def make_loss(self):
        return lambda x, w, t: x.detach() @ w.detach().t()

    def backward(self, logits):
        self.gradients = logits @ self.w.detach(), logits.t() @ self.x.detach()
        del self.gradients


CONTENDERS = {"cece": Cece, "eager": Eager, "compile": Compiled, "torch chunked": Chunked, "three matmuls": Matmuls}

CASES = [
    LinearCase("linear CE 2048 x 256 -> 32000", 2048, 256, 32000, must={"eager": 1.3}),
    LinearCase("linear CE 1024 x 1024 -> 32000", 1024, 1024, 32000),
    LinearCase("linear CE 2048 x 256 -> 32000, half ignored", 2048, 256, 32000, ignored=0.5, must={"eager": 2}),
    LinearCase("linear CE 2048 x 256 -> 32000, bf16", 2048, 256, 32000, dtype=torch.bfloat16),
]

if __name__ == "__main__":
    harness.main(CASES)
