"""README's guide: every snippet trains, and to the same parameters with torch's losses in place of cece's.

This file is also the program that runs one. A library that is not installed has a stand-in here, with as much of its
documented interface as the snippet uses; the test's name says which it was.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import cece

HERE = Path(__file__).resolve()
GUIDE = re.search(r"^## Guide\n(.*?)^## ", (HERE.parents[1] / "README.md").read_text(), re.M | re.S)[1]
SNIPPETS = dict(re.findall(r"^### (.+?)\n\n```python\n(.*?)^```", GUIDE, re.M | re.S))
RANKS = {"DistributedDataParallel": 2, "FSDP": 2, "DTensor": 2, "Tensor parallelism": 2}  # processes; one for others
SECONDS = 900  # no deadline: only a hang takes so long, also on a busy machine
LIBRARY = {
    "Hugging Face Trainer": "transformers",
    "Hugging Face Trainer without logits": "transformers",
    "Lightning": "lightning",
    "timm": "timm",
}


def usable(library):
    """Installed, and it imports beside this torch: timm's torchvision may not."""
    if importlib.util.find_spec(library) is None:
        return False
    code = {"transformers": "from transformers import Trainer; import accelerate", "timm": "import timm.task"}
    done = subprocess.run([sys.executable, "-c", code.get(library, f"import {library}")], capture_output=True)
    return done.returncode == 0


# ---- stand-ins


class LanguageModel(torch.nn.Module):
    """What a causal language model of transformers returns: an object with logits (N, L, C)."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))

    def forward(self, input_ids):
        return types.SimpleNamespace(logits=self.layers(input_ids))

    def base_model(self, input_ids):
        return types.SimpleNamespace(last_hidden_state=self.layers[0](input_ids))

    def get_output_embeddings(self):
        return self.layers[1]


class TrainingArguments:
    def __init__(self, output_dir, *, num_train_epochs, gradient_accumulation_steps):
        self.epochs, self.steps = num_train_epochs, gradient_accumulation_steps


class Trainer:
    """Sums the loss over the batches of a step; the loss divides by the step's number of labels."""

    def __init__(self, model, args, *, train_dataset, compute_loss_func=None):
        self.model, self.args, self.dataset, self.loss = model, args, train_dataset, compute_loss_func

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model(inputs["input_ids"]), inputs["labels"], num_items_in_batch=num_items_in_batch)

    def train(self):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        batches = [{k: torch.stack([v]) for k, v in item.items()} for item in self.dataset]
        for _ in range(self.args.epochs):
            for i in range(0, len(batches), self.args.steps):
                step = batches[i : i + self.args.steps]
                count = sum((b["labels"][:, 1:] != -100).sum() for b in step)
                for b in step:
                    self.compute_loss(self.model, b, num_items_in_batch=count).backward()
                optimizer.step()
                optimizer.zero_grad()


class LightningTrainer:
    def __init__(self, *, max_epochs):
        self.epochs = max_epochs

    def fit(self, module, loader):
        optimizer = module.configure_optimizers()
        for _ in range(self.epochs):
            for i, batch in enumerate(loader):
                optimizer.zero_grad()
                module.training_step(batch, i).backward()
                optimizer.step()


class ClassificationTask(torch.nn.Module):
    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, input, target):
        output = self.model(input)
        return {"loss": self.criterion(output, target), "output": output}


def create_optimizer_v2(model, *, opt, lr):
    return {"sgd": torch.optim.SGD}[opt](model.parameters(), lr=lr)


def module(name, **names):
    m = types.ModuleType(name)
    m.__dict__.update(names)
    return m


STAND_INS = {
    "transformers": [module("transformers", Trainer=Trainer, TrainingArguments=TrainingArguments)],
    "lightning": [module("lightning", LightningModule=torch.nn.Module, Trainer=LightningTrainer)],
    "timm": [
        optim := module("timm.optim", create_optimizer_v2=create_optimizer_v2),
        module("timm.task", ClassificationTask=ClassificationTask),
        module("timm", optim=optim),
    ],
}


# ---- running a snippet


def prelude(name, real):
    """What the guide calls yours, the same model on each rank and other data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    if LIBRARY.get(name) == "transformers" and not real:
        model = LanguageModel()
    elif LIBRARY.get(name) == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=16))
    torch.manual_seed(int(os.environ["RANK"]))
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)]
    if name == "timm":
        batches[1] = batches[1][0], torch.rand(4, 3).softmax(1)  # as of Mixup
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    tokens = torch.randint(16, (32, 5))
    dataset = [{"input_ids": t, "labels": t.where(t > 2, -100)} for t in tokens]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "loader": loader, "dataset": dataset, "optimizer": optimizer, "device": "cpu"}


def counted(functions, modules):
    """The losses a snippet uses, of cece or of torch, and the list their calls are counted in."""
    calls = []

    def cross_entropy(*args, **options):
        calls.append("cross_entropy")
        return functions.cross_entropy(*args, **options)

    def linear_cross_entropy(input, linear_weight, target, *, linear_bias, normalizer):
        calls.append("linear_cross_entropy")
        if functions is cece:
            return cece.linear_cross_entropy(
                input, linear_weight, target, linear_bias=linear_bias, normalizer=normalizer
            )
        logits = functions.linear(input, linear_weight, linear_bias)
        loss = functions.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        return loss / normalizer

    class CrossEntropyLoss(modules.CrossEntropyLoss):
        def forward(self, input, target):
            calls.append("CrossEntropyLoss")
            return super().forward(input, target)

    losses = {f.__name__: f for f in (cross_entropy, linear_cross_entropy, CrossEntropyLoss)}
    return types.SimpleNamespace(**losses), calls


def parameters(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def run(name, real, path):
    """Once with cece's losses and once with torch's."""
    if not real:
        sys.modules.update({m.__name__: m for m in STAND_INS.get(LIBRARY.get(name), ())})
    outcomes = []
    ports = os.environ["PORTS"].split()
    for port, (functions, modules) in zip(ports, [(cece, cece), (torch.nn.functional, torch.nn)], strict=True):
        os.environ["MASTER_PORT"] = port
        losses, calls = counted(functions, modules)
        yours = prelude(name, real)
        before = parameters(yours["model"])
        exec(compile(SNIPPETS[name], f"README: {name}", "exec"), {"torch": torch, "cece": losses, **yours})
        outcomes.append({"calls": calls, "before": before, "after": parameters(yours["model"])})
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    torch.save(outcomes, path)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def outcomes(name, real, directory):
    """Of each rank, what it had with cece and with torch."""
    ranks = RANKS.get(name, 1)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "PORTS": " ".join(map(str, free_ports(2))),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    paths = [directory / f"{rank}.pt" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), name, str(int(real)), str(path)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, path in enumerate(paths)
    ]
    try:
        said = [p.communicate(timeout=SECONDS)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(said)
    return [torch.load(path) for path in paths]


USED = {name: name in LIBRARY and usable(LIBRARY[name]) for name in SNIPPETS}


def title(name):
    return name if name not in LIBRARY else f"{name}, {LIBRARY[name] if USED[name] else 'stand-in'}"


@pytest.mark.parametrize("name", SNIPPETS, ids=title)
def test_snippet_trains_as_with_torch(name, tmp_path):
    for a, b in outcomes(name, USED[name], tmp_path):
        assert a["calls"] and a["calls"] == b["calls"]
        assert not all(map(torch.equal, a["before"], a["after"]))
        torch.testing.assert_close(a["before"], b["before"], rtol=0, atol=0)
        torch.testing.assert_close(a["after"], b["after"], rtol=1e-4, atol=1e-6)


def test_guide_is_whole_and_short():
    wanted = {*LIBRARY, *RANKS, "Mixed precision", "torch.compile"}
    assert set(SNIPPETS) == wanted and GUIDE.count("```python") == len(wanted)
    assert all(len(code.splitlines()) <= 16 for code in SNIPPETS.values())


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2] == "1", sys.argv[3])
