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
from matplotlib.ticker import LogLocator, MaxNLocator  # noqa: E402

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


# Of each loss: its colour, and the marker it has on the curve of the task's reference.
STYLES = {
    "torch": ("#e8a33d", None),
    "cece": ("#1f5fa8", "o"),
    "torch sigmoid": ("#e8a33d", None),
    "cece sigmoid": ("#1f5fa8", "o"),
    "torch softmax": ("#a0522d", "s"),
    "cece softmax": ("#4aa3c7", "^"),
}


def by_epoch(values, task, reduce):
    """One number an epoch: single steps jump too much to be seen apart."""
    return reduce(values.reshape(task.epochs, -1), axis=1)


def draw_losses(axes, task, runs):
    """The reference as a broad line, the others as marks on it, which take turns: no mark hides another."""
    epochs, others = np.arange(1, task.epochs + 1), len(runs) - 1
    for i, (name, run) in enumerate(runs.items()):
        colour, marker = STYLES[name]
        line = {"linewidth": 7, "alpha": 0.6, "solid_capstyle": "round"} if marker is None else {"linestyle": "none"}
        turns = None if marker is None else slice(i - 1, None, others)
        losses = by_epoch(run.losses, task, np.mean)
        axes.plot(epochs, losses, color=colour, marker=marker, markersize=6, markevery=turns, label=name, **line)
    accuracies = {f"{run.accuracy:.2%}" for run in runs.values()}
    how_good = (
        f"held-out accuracy {accuracies.pop()} with each loss" if len(accuracies) == 1 else "held-out accuracies differ"
    )
    axes.set_title(f"{task.name}: {task.question}\n", fontsize=13)
    axes.text(0.5, 1.03, how_good, transform=axes.transAxes, ha="center", color="#555555")
    axes.set(xlabel="epoch", ylabel="training loss, mean of an epoch (nats)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def draw_gaps(axes, task, runs):
    floor = 1e-9  # equal to the last bit has no place on a log axis
    epochs = np.arange(1, task.epochs + 1)
    for name, run in list(runs.items())[1:]:
        colour, marker = STYLES[name]
        gaps = np.maximum(by_epoch(gap(run, runs), task, np.max), floor)
        axes.plot(epochs, gaps, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
    axes.axhline(BOUND, color="#b03030", linestyle="--", linewidth=1)
    axes.text(1, BOUND * 1.4, f"the demo fails above {BOUND:g}", color="#b03030", fontsize=9, va="bottom")
    axes.set(xlabel="epoch", ylabel=f"largest |loss - {next(iter(runs))}|", yscale="log", ylim=(floor / 2, BOUND * 20))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_times(axes, runs):
    """A bar for each loss, the number beside it."""
    times = [microseconds(run) for run in runs.values()]
    axes.barh(range(len(runs)), times, color=[STYLES[name][0] for name in runs], height=0.75)
    for place, time_ in enumerate(times):
        axes.text(time_, place, f" {time_:.0f} \u00b5s", va="center")
    axes.set_yticks(range(len(runs)), list(runs))
    label = f"time in the loss of {BATCH} samples, forward + backward"
    axes.set(xlim=(0, 1.2 * max(times)), ylim=(3.5, -0.5), xticks=[], xlabel=label)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_samples(figure, results, device, count=6):
    """Held-out digits and what the two models trained with cece say of them; what is wrong is red."""
    models = {task.name: runs["cece"].model for task, runs in results if "cece" in runs}
    _, (images, labels), _ = prepare(TASKS[0], device)
    digits_said = models["multi-class"](images).argmax(1).tolist()
    truths_said = (models["multi-label"](images) > 0).tolist()
    labels = labels.tolist()
    wrong = [i for i, label in enumerate(labels) if digits_said[i] != label]
    chosen = wrong[:1] + [labels.index(digit) for digit in (0, 2, 4, 7, 9, 1)]
    title = "Held-out digits, and what the two models trained with cece say of them (red: wrong)"
    figure.suptitle(title, fontsize=13)
    grid = figure.add_gridspec(1, 2 * count, width_ratios=[1, 0.8] * count, wspace=0.06)
    for i, index in enumerate(chosen[:count]):
        said, label = digits_said[index], labels[index]
        picture = figure.add_subplot(grid[2 * i])
        picture.imshow(images[index, 0].cpu(), cmap="gray_r")
        picture.set(xticks=[], yticks=[])
        picture.set_title(f"{said}" if said == label else f"{said}, is {label}", color=tint(said == label))
        words = figure.add_subplot(grid[2 * i + 1])
        words.set_box_aspect(1 / 0.8)
        words.axis("off")
        for row, (name, members) in enumerate(ATTRIBUTES.items()):
            said = truths_said[index][row]
            text = ("\u2713 " if said else "\u2013 ") + name
            words.text(0, 0.9 - 0.2 * row, text, va="center", fontsize=9, color=tint(said == (label in members)))


def tint(right):
    return "#222222" if right else "#c02020"


class Verdict:
    """How far any loss ever was from its task's reference, and any logit's gradient."""

    def __init__(self, results):
        runs = [(gap(run, runs).max(), run.gradient_gap) for _, runs in results for run in runs.values()]
        self.losses, self.gradients = np.max(runs, axis=0)

    def holds(self):
        return bool(self.losses <= BOUND and self.gradients <= BOUND)  # a NaN does not


def draw(results, verdict, device, path):
    figure = plt.figure(figsize=(16, 15), layout="constrained")
    head, body, samples = figure.subfigures(3, 1, height_ratios=[1, 13, 2.6])
    said = (
        "Training with cece gives the same curves as with torch" if verdict.holds() else "cece's curves are NOT torch's"
    )
    head.text(0.5, 0.72, said, ha="center", va="center", fontsize=22, weight="bold")
    steps = sum(len(reference(runs).losses) for _, runs in results)
    how = (
        f"same data, weights and batches ({device.type}): in {steps} steps no loss is further than"
        f" {verdict.losses:.1e} from torch's, no gradient further than {verdict.gradients:.1e}"
    )
    head.text(0.5, 0.22, how, ha="center", va="center", fontsize=13)
    places = body.add_gridspec(3, len(results), height_ratios=[3, 1.8, 1.3])
    for i, (task, runs) in enumerate(results):
        draw_losses(body.add_subplot(places[0, i]), task, runs)
        draw_gaps(body.add_subplot(places[1, i]), task, runs)
        draw_times(body.add_subplot(places[2, i]), runs)
    draw_samples(samples, results, device)
    figure.savefig(path, dpi=100)


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
    verdict = Verdict(results)
    draw(results, verdict, device, arguments.output)
    print(
        f"Losses and gradients {'coincide' if verdict.holds() else 'DIFFER'}: at most {verdict.losses:.1e} and"
        f" {verdict.gradients:.1e} apart, the bound is {BOUND:g}. Picture: {arguments.output}"
    )
    return 0 if verdict.holds() else 1


if __name__ == "__main__":
    sys.exit(main())
