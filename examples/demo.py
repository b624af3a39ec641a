"""Three kinds of classification, each trained twice: with cece's loss and with torch's, in lock-step.

    multi-class    one of ten digits an image          CrossEntropyLoss     a label an image
    multi-label    five true or false statements        BCEWithLogitsLoss    five truths an image
    binary         malignant or benign                  either: one logit with the sigmoid, or two with the softmax

The data comes with scikit-learn; nothing is downloaded. Same seeds, same batches: the loss curves must coincide, or
the demo exits with 1. What it prints it also draws, in demo.png. Run it with ``make demo``.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import cece

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BOUND = 1e-5  # nats: how far two loss curves may part. They are of float32, whose last bit is 2e-7 at a loss of 2.
SEED = 0
BATCH = 64

# In this data set a 4 is mostly written open, so it counts as having no loop.
ATTRIBUTES = {
    "even": {0, 2, 4, 6, 8},
    "prime": {2, 3, 5, 7},
    "loop": {0, 6, 8, 9},
    "> four": {5, 6, 7, 8, 9},
    "square": {0, 1, 4, 9},
}


# ---- data: inputs and targets


def digits():
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)


def digit_attributes():
    images, labels = digits()
    truths = [[label in members for members in ATTRIBUTES.values()] for label in labels.tolist()]
    return images, torch.tensor(truths, dtype=torch.float32)


def tumours():
    data = load_breast_cancer()
    features = (data.data - data.data.mean(0)) / data.data.std(0)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32).unsqueeze(1)


# ---- models. Tanh, as ReLU's kink turns a difference in the last bit into one that grows a hundredfold in 20 steps.


def image_model(outputs):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, outputs),
    )


def feature_model(outputs):
    return nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, outputs))


# ---- losses and accuracies


def as_two_classes(loss):
    """A softmax over the logits [0, z] is the sigmoid of z: the cross-entropy of the pair is the BCE of z."""
    return lambda z, truth: loss(torch.cat([torch.zeros_like(z), z], dim=1), truth.squeeze(1).long())


def right_class(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def right_truths(logits, truths):
    return ((logits > 0) == truths.bool()).float().mean().item()


# ---- the three tasks. The first loss of each is the reference the others are held against.


@dataclass
class Task:
    name: str
    question: str
    data: Callable
    model: Callable
    outputs: int
    accuracy: Callable
    epochs: int
    losses: dict


TASKS = [
    Task(
        "multi-class",
        "which digit?",
        digits,
        image_model,
        10,
        right_class,
        20,
        {"torch": nn.CrossEntropyLoss(), "cece": cece.CrossEntropyLoss()},
    ),
    Task(
        "multi-label",
        "which attributes?",
        digit_attributes,
        image_model,
        len(ATTRIBUTES),
        right_truths,
        20,
        {"torch": nn.BCEWithLogitsLoss(), "cece": cece.BCEWithLogitsLoss()},
    ),
    Task(
        "binary",
        "is the tumour benign?",
        tumours,
        feature_model,
        1,
        right_truths,
        40,
        {
            "torch sigmoid": nn.BCEWithLogitsLoss(),
            "cece sigmoid": cece.BCEWithLogitsLoss(),
            "torch softmax": as_two_classes(nn.CrossEntropyLoss()),
            "cece softmax": as_two_classes(cece.CrossEntropyLoss()),
        },
    ),
]


# ---- training


@dataclass
class Run:
    """One model in training with one loss."""

    loss: Callable
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)  # of every step
    gradient_gap: float = 0.0  # the largest difference of a logit's gradient from the reference's, over all steps
    seconds: list = field(default_factory=list)  # in the loss, forward and backward, of every step
    accuracy: float = 0.0

    def step(self, inputs, targets):
        logits = self.model(inputs)
        start = now(inputs.device)
        loss = self.loss(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits)
        self.seconds.append(now(inputs.device) - start)
        self.losses.append(loss.detach())
        self.optimizer.zero_grad()
        logits.backward(gradient)
        self.optimizer.step()
        return gradient


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare(task, device):
    """Training and held-out data, and a run for each loss, all from the same weights."""
    inputs, targets = task.data()
    train, held_out = train_test_split(np.arange(len(inputs)), test_size=0.25, random_state=SEED)
    torch.manual_seed(SEED)
    model = task.model(task.outputs).to(device)
    runs = {}
    for name, loss in task.losses.items():
        its_own = copy.deepcopy(model)
        runs[name] = Run(loss, its_own, torch.optim.SGD(its_own.parameters(), lr=0.1, momentum=0.9))
    inputs, targets = inputs.to(device), targets.to(device)
    return (inputs[train], targets[train]), (inputs[held_out], targets[held_out]), runs


def train(task, device):
    """Trains every run of the task on the same batches, one step each in turn."""
    (inputs, targets), held_out, runs = prepare(task, device)
    whole = len(inputs) // BATCH * BATCH  # a last batch of three would only make the curves jump
    batches = [b for _ in range(task.epochs) for b in torch.randperm(len(inputs))[:whole].split(BATCH)]
    progress = tqdm(batches, desc=f"{task.name:12}", unit="step", file=sys.stdout)
    for batch in progress:
        gradients = [run.step(inputs[batch], targets[batch]) for run in runs.values()]
        for run, gradient in zip(runs.values(), gradients, strict=True):
            run.gradient_gap = np.maximum(run.gradient_gap, (gradient - gradients[0]).abs().max().item())
    for run in runs.values():
        run.losses = torch.stack(run.losses).cpu().numpy()
        with torch.no_grad():
            run.accuracy = task.accuracy(run.model(held_out[0]), held_out[1])
    return runs


def reference(runs):
    return next(iter(runs.values()))


def gap(run, runs):
    """How far the run's loss ever is from the reference's."""
    return np.abs(run.losses - reference(runs).losses)


def microseconds(run):
    return 1e6 * float(np.median(run.seconds))


# ---- what came of it


def print_summary(results):
    print(
        f"\n{'task':12} {'loss':14} {'last loss':>10} {'held-out':>9} {'curve gap':>10} {'grad gap':>9} {'in loss':>9}"
    )
    for task, runs in results:
        for name, run in runs.items():
            print(
                f"{task.name:12} {name:14} {run.losses[-20:].mean():10.4f} {run.accuracy:9.2%}"
                f" {gap(run, runs).max():10.1e} {run.gradient_gap:9.1e} {microseconds(run):6.0f} us"
            )
    print("gaps: the largest of all steps, from the first loss of the task. in loss: median step, forward + backward.")


COLOURS = {"torch": "#e8a33d", "cece": "#1f5fa8"}
SECOND = {"torch": "#b5651d", "cece": "#5bb0d9"}  # of a second pair


def colour(name):
    return (SECOND if "softmax" in name else COLOURS)[name.split()[0]]


def draw_losses(axes, task, runs):
    for name, run in runs.items():
        if name.startswith("torch"):
            axes.plot(run.losses, color=colour(name), linewidth=4.5, alpha=0.6, label=name)
        else:
            axes.plot(run.losses, color=colour(name), linewidth=1, label=name, linestyle=(0, (4, 2)))
    axes.set(title=f"{task.name}: {task.question}", xlabel="step", ylabel="training loss (nats)", yscale="log")
    axes.legend(fontsize=8, loc="upper right")


def draw_gaps(axes, runs):
    floor = 1e-9  # equal to the last bit has no place on a log axis
    for name, run in list(runs.items())[1:]:
        axes.plot(np.maximum(gap(run, runs), floor), color=colour(name), linewidth=1, label=name)
    axes.axhline(BOUND, color="#b03030", linestyle="--", linewidth=1)
    axes.text(0, BOUND * 1.4, f"bound {BOUND:g}", color="#b03030", fontsize=8, va="bottom")
    axes.set(xlabel="step", ylabel=f"|loss - {next(iter(runs))}|", yscale="log", ylim=(floor / 2, BOUND * 20))
    if len(runs) > 2:
        axes.legend(fontsize=8, loc="center right")


def draw_bars(axes, results, value, label, limit):
    """A bar for each loss of each task, the number beside it."""
    names = [(task, name, run) for task, runs in results for name, run in runs.items()]
    values = [value(run) for _, _, run in names]
    places = [i + 0.8 * [t for t, _ in results].index(task) for i, (task, _, _) in enumerate(names)]
    axes.barh(places, values, color=[colour(name) for _, name, _ in names], height=0.8)
    for place, v in zip(places, values, strict=True):
        axes.text(v, place, " " + label.format(v), va="center", fontsize=8)
    axes.set_yticks(places, [f"{task.name}, {name}" for task, name, _ in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, limit * max(values))


def draw_samples(figure, place, results, device, count=6):
    """Held-out digits and what the two cece models say of them: what is wrong is red, the label beside it."""
    models = {task.name: runs["cece"].model for task, runs in results if "cece" in runs}
    _, (images, labels), _ = prepare(TASKS[0], device)
    digits_said = models["multi-class"](images).argmax(1).tolist()
    truths_said = (models["multi-label"](images) > 0).tolist()
    labels = labels.tolist()
    wrong = [i for i, label in enumerate(labels) if digits_said[i] != label]
    chosen = wrong[:1] + [labels.index(digit) for digit in (0, 2, 4, 7, 9, 1)]
    grid = place.subgridspec(1, 2 * count, width_ratios=[1, 0.8] * count, wspace=0.06)
    for i, index in enumerate(chosen[:count]):
        said, label = digits_said[index], labels[index]
        picture = figure.add_subplot(grid[2 * i])
        picture.imshow(images[index, 0].cpu(), cmap="gray_r")
        picture.set(xticks=[], yticks=[])
        picture.set_title(f"{said}" if said == label else f"{said} (is {label})", color=tint(said == label))
        words = figure.add_subplot(grid[2 * i + 1])
        words.set_box_aspect(1 / 0.8)
        words.axis("off")
        for row, (name, members) in enumerate(ATTRIBUTES.items()):
            said = truths_said[index][row]
            text = ("\u2713 " if said else "\u2013 ") + name
            words.text(0, 0.9 - 0.2 * row, text, va="center", fontsize=9, color=tint(said == (label in members)))


def tint(right):
    return "#222222" if right else "#c02020"


def draw(results, device, path):
    figure = plt.figure(figsize=(15, 13), layout="constrained")
    figure.suptitle(f"cece and torch, same seeds, same batches ({device.type})", fontsize=15)
    rows = figure.add_gridspec(4, 1, height_ratios=[3, 2.2, 2.4, 1.5])
    curves, gaps = rows[0].subgridspec(1, 3), rows[1].subgridspec(1, 3)
    for i, (task, runs) in enumerate(results):
        draw_losses(figure.add_subplot(curves[i]), task, runs)
        draw_gaps(figure.add_subplot(gaps[i]), runs)
    bars = rows[2].subgridspec(1, 2)
    accuracies, times = figure.add_subplot(bars[0]), figure.add_subplot(bars[1])
    accuracies.set_title("held-out accuracy")
    draw_bars(accuracies, results, lambda run: 100 * run.accuracy, "{:.2f} %", 1.15)
    times.set_title("time in the loss, median step, forward + backward")
    draw_bars(times, results, microseconds, "{:.0f} \u00b5s", 1.15)
    draw_samples(figure, rows[3], results, device)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo.png", help="the picture (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)  # these models are too small to gain from more
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False

    results = [(task, train(task, device)) for task in TASKS]
    print_summary(results)
    draw(results, device, arguments.output)
    runs = [(run, gap(run, runs).max()) for _, runs in results for run in runs.values()]
    curves, gradients = np.max([worst for _, worst in runs]), np.max([run.gradient_gap for run, _ in runs])
    coincide = bool(curves <= BOUND and gradients <= BOUND)
    print(
        f"Losses and gradients {'coincide' if coincide else 'DIFFER'}: at most {curves:.1e} and {gradients:.1e}"
        f" apart, the bound is {BOUND:g}. Picture: {arguments.output}"
    )
    return 0 if coincide else 1


if __name__ == "__main__":
    sys.exit(main())
