"""A small transformer learns the source of Python's standard library, once with logits and once without.

    logits      torch.nn.functional.cross_entropy(hidden @ weight.T, next token): the logits and their gradient are held
    no logits   cece.linear_cross_entropy(hidden, weight, next token): a chunk of them at a time

The text is on every machine that has Python; nothing is downloaded. Same seed, same batches: the curves must coincide,
or the example exits with 1. Beside them stand the time of a step and the memory it takes; train_lm.png draws it all.
Each runs in a process of its own, whose memory is nobody else's.

With ``--rl`` the trained model then learns by rewards what text to write, in a few steps of a policy gradient in the
manner of GRPO: cece.token_statistics gives log-probability and entropy of every token from one pass over its logits.

    python examples/train_lm.py [--rl] [--steps 60] [--vocabulary 16384] [--device cpu] [--out train_lm.png]

With ``--vocabulary-parallel`` the output layer is cut along the vocabulary, a part a process, and logits are a DTensor
that no process has all of; with ``--data-parallel`` half of the processes have other batches. The first process then
trains alone: the curves must coincide again.

    torchrun --nproc-per-node 2 examples/train_lm.py --vocabulary-parallel
    torchrun --nproc-per-node 4 examples/train_lm.py --vocabulary-parallel --data-parallel fsdp
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cece

BOUND = 1e-3  # nats: two runs in float32 whose sums have another order drift apart as training goes on
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 2, 4, 128, 8
UNKNOWN = 0


# ---- data: words, spaces and signs of the standard library, numbered by how often they occur


def tokens(characters):
    root = Path(sysconfig.get_paths()["stdlib"])
    text, size = [], 0
    for file in sorted(root.glob("*.py")):
        text.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(text[-1])
        if size > characters:
            break
    return re.findall(r"\w+|\s+|[^\w\s]", "".join(text))


def numbered(words, vocabulary):
    names = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    number = {word: i for i, word in enumerate(names, UNKNOWN + 1)}
    return torch.tensor([number.get(word, UNKNOWN) for word in words]), ["?", *names]


def batches(text, generator):
    while True:
        start = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + CONTEXT + 1] for s in start])


# ---- model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, words):
        """The hidden states that the head makes logits of."""
        x = self.word(words) + self.place.weight[: words.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)


def with_logits(hidden, head, target):
    return F.cross_entropy(head(hidden), target)


def without_logits(hidden, head, target):
    return cece.linear_cross_entropy(hidden, head.weight, target)


LOSSES = {"logits": with_logits, "no logits": without_logits}


# ---- training, in a process for each loss


def peak_memory(device):
    """Bytes, the highest so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Trained(nn.Module):
    """A model and its loss, which is formed where the model's weights are at hand."""

    def __init__(self, model, loss_of):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, words):
        return self.loss_of(self.model(words[:, :-1]), self.model.head, words[:, 1:].flatten())


def train(args, over_ranks=None):
    words = tokens(args.characters)
    text, names = numbered(words, args.vocabulary)
    torch.manual_seed(0)
    model = Model(len(names)).to(args.device)
    trained = Trained(model, LOSSES[args.loss])
    if over_ranks:
        trained = over_ranks.cut(trained)
    # foreach takes no parameters of different meshes together
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False if over_ranks else None)
    batch_of = batches(text, torch.Generator().manual_seed(1))
    losses, seconds = [], []
    for step in range(args.steps):
        words = next(batch_of).to(args.device)
        begin = time.perf_counter()
        loss = trained(over_ranks.mine(words) if over_ranks else words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(over_ranks.mean(loss) if over_ranks else loss.item())
        seconds.append(time.perf_counter() - begin)
        if sys.stderr.isatty():
            print(f"\r{args.loss}: step {step + 1} of {args.steps}, loss {losses[-1]:.3f}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    result = {"loss": losses, "seconds": sorted(seconds)[len(seconds) // 2], "peak": peak_memory(args.device)}
    if args.rl:
        result["reward"] = reinforce(model, text, names, args.device, rounds=min(20, args.steps))
    return result


# ---- by rewards


@torch.no_grad()
def sampled(model, prompt, length):
    words = prompt
    for _ in range(length):
        logits = model.head(model(words).unflatten(0, words.shape)[:, -1])
        words = torch.cat([words, logits.softmax(-1).multinomial(1)], 1)
    return words


def log_prob_and_entropy(model, words, length):
    hidden = model(words[:, :-1]).unflatten(0, (len(words), -1))[:, -length:]
    s = cece.token_statistics(model.head(hidden), words[:, -length:], entropy=True, dim=-1)
    return s.log_prob, s.entropy


def reinforce(model, text, names, device, rounds, groups=4, members=16, length=16):
    """Mean reward of every round. A text is worth its share of lower-case words; those of one prompt compete."""
    worth = torch.tensor([float(name.isalpha() and name.islower()) for name in names], device=device)
    optimizer, rewards = torch.optim.AdamW(model.parameters(), lr=3e-4), []
    generator = torch.Generator().manual_seed(2)
    for _ in range(rounds):
        start = torch.randint(len(text) - CONTEXT, (groups,), generator=generator)
        prompt = torch.stack([text[s : s + CONTEXT // 2] for s in start]).to(device)
        words = sampled(model, prompt.repeat_interleave(members, 0), length)
        reward = worth[words[:, -length:]].mean(1)
        group = reward.unflatten(0, (groups, members))
        advantage = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)).flatten()[:, None]
        with torch.no_grad():
            before, _ = log_prob_and_entropy(model, words, length)
        for _ in range(2):
            log_prob, entropy = log_prob_and_entropy(model, words, length)
            ratio = (log_prob - before).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = -gain.mean() - 0.01 * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    return rewards


# ---- over several processes, that torchrun starts


class OverRanks:
    """A mesh of data x vocabulary: rows of processes have different batches, columns other words of the vocabulary."""

    def __init__(self, device, data_parallel):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if device.startswith("cuda") else "cpu"
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.data_parallel, self.rank = data_parallel, dist.get_rank()
        rows = dist.get_world_size() // 2 if data_parallel else 1
        self.mesh = init_device_mesh(kind, (rows, dist.get_world_size() // rows), mesh_dim_names=("data", "vocabulary"))

    def cut(self, trained):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)  # logits stay cut: a DTensor
        parallelize_module(trained, self.mesh["vocabulary"], {"model.head": head})
        if self.data_parallel == "fsdp":
            return fully_shard(trained, mesh=self.mesh["data"])
        if self.data_parallel == "ddp":
            return nn.parallel.DistributedDataParallel(trained, device_mesh=self.mesh["data"])
        return trained

    def mine(self, words):
        return words.chunk(self.mesh.size(0))[self.mesh.get_local_rank("data")]

    def mean(self, loss):
        """Over the batches; of one batch all processes have the same."""
        import torch.distributed as dist

        value = loss.detach().full_tensor()
        dist.all_reduce(value, group=self.mesh.get_group("data"))
        return (value / self.mesh.size(0)).item()


def train_over_ranks(args):
    import torch.distributed as dist

    over_ranks, apart = OverRanks(args.device, args.data_parallel), 0.0
    for args.loss in LOSSES:
        with cece.patch():  # torch.nn.functional.cross_entropy, too
            cut = train(args, over_ranks)["loss"]
        if over_ranks.rank == 0:
            alone = train(args)["loss"]
            apart = max(apart, *(abs(a - b) for a, b in zip(cut, alone, strict=True)))
            print(f"{args.loss:10} over {over_ranks.mesh.shape} processes: loss {cut[0]:.3f} -> {cut[-1]:.3f}")
        dist.barrier()
    if over_ranks.rank == 0:
        print(f"the curves of one process part by {apart:.1e} nats at most (allowed: {BOUND:.0e})")
    dist.destroy_process_group()
    return 0 if apart <= BOUND else 1


# ---- both, and what came of them


def run(args, name):
    command = [sys.executable, __file__, "--loss", name, "--steps", args.steps, "--vocabulary", args.vocabulary]
    command += ["--characters", args.characters, "--device", args.device]
    command += ["--rl"] * (args.rl and name == "no logits")
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def draw(results, path):
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rewards = results["no logits"].get("reward")
    figure, axes = plt.subplots(1, 4 if rewards else 3, figsize=(15 if rewards else 12, 3.4), layout="constrained")
    for (name, r), style in zip(results.items(), ("-", "--"), strict=True):
        axes[0].plot(range(1, len(r["loss"]) + 1), r["loss"], style, label=name)
    axes[0].set(xlabel="step", ylabel="loss, nats", title="the same curve")
    axes[0].legend()
    for ax, title, values in (
        (axes[1], "milliseconds a step", [1e3 * r["seconds"] for r in results.values()]),
        (axes[2], "peak memory, MiB", [r["peak"] / 2**20 for r in results.values()]),
    ):
        ax.bar_label(ax.bar(list(results), values, color=["C0", "C1"]), fmt="%.0f")
        ax.set(title=title)
        ax.margins(y=0.1)
    if rewards:
        axes[3].plot(range(1, len(rewards) + 1), rewards, color="C2")
        axes[3].set(xlabel="round", title="reward: share of lower-case words")
    figure.savefig(path, dpi=120)
    return f"drawn in {path}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--vocabulary", type=int, default=16384, help="words; the rest are one unknown word")
    parser.add_argument("--characters", type=int, default=4_000_000, help="of the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rl", action="store_true", help="then a few steps of reinforcement learning")
    parser.add_argument("--vocabulary-parallel", action="store_true", help="under torchrun: cut the output layer")
    parser.add_argument("--data-parallel", choices=["fsdp", "ddp"], help="beside it, over half of the processes")
    parser.add_argument("--out", type=Path, default="train_lm.png")
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)  # one of the two, as JSON
    args = parser.parse_args()
    if args.vocabulary_parallel:
        return train_over_ranks(args)
    if args.loss:
        print(json.dumps(train(args)))
        return 0
    results = {name: run(args, name) for name in LOSSES}
    for name, r in results.items():
        print(
            f"{name:10} loss {r['loss'][0]:.3f} -> {r['loss'][-1]:.3f}, {1e3 * r['seconds']:.0f} ms a step,"
            f" {r['peak'] / 2**20:.0f} MiB at most"
        )
    apart = max(abs(a - b) for a, b in zip(*(r["loss"] for r in results.values()), strict=True))
    print(f"the curves part by {apart:.1e} nats at most (allowed: {BOUND:.0e})")
    if rewards := results["no logits"].get("reward"):
        print(f"reward: {rewards[0]:.2f} -> {rewards[-1]:.2f} in {len(rewards)} rounds")
    print(draw(results, args.out))
    return 0 if apart <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
