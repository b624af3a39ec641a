"""DTensors: the loss, its placement and every gradient are those of one process. Real processes, joined by gloo.

This file is also the program of a rank, which runs every case and writes down what went wrong with each.
"""

import datetime
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cece

HERE = Path(__file__).resolve()
RANKS = 4  # a mesh of 4, and one of 2 x 2
SECONDS = 240
REDUCTIONS = ("none", "mean", "sum")
CE, LOGITS, PROBABILITIES = "cross_entropy", "binary_cross_entropy_with_logits", "binary_cross_entropy"


# ---- shape of input -> its placements: R replicated, P a partial sum, S1 sharded along dimension 1. One is a placement
# on the mesh of 4, where 5 rows are 2, 2, 1 and 0; two are on the mesh of 2 x 2.
CE_PLACED = {
    (8, 6): ["S0", "R", "S1", "P", "S0 S0", "S0 R", "S0 S1", "R S1", "P S0"],
    (5, 6): ["S0", "S0 S0", "R S0"],
    (1, 6): ["S0"],
    (0, 6): ["S0"],
    (6,): ["R", "S0"],
    (3, 5, 7): ["S0", "S1", "S2", "S0 S2", "S2 S0", "S1 S2", "S2 P"],
    (2, 3, 4, 5): ["S3", "S2 S3", "S0 R"],
}
BCE_PLACED = {
    (8, 6): ["S0", "S1", "R", "P", "S0 S1", "S1 S0", "S0 S0", "P S1"],
    (5, 1): ["S0", "S1"],
    (3, 5, 7): ["S2", "S0 S2"],
    (): ["R"],
}


# ---- what is asked: shape of input -> the other arguments, which have a gradient checked where they require one
def labels(shape, ignored=slice(0, None, 3)):
    class_dim = min(1, len(shape) - 1)
    target = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    if target.dim():
        target[ignored] = -100
    return target


def class_weights(shape):
    return torch.rand(shape[min(1, len(shape) - 1)])


def grad(t):
    return t.requires_grad_()


CE_ASKED = {
    "labels": lambda s: {"target": labels(s)},
    "labels of a rank all ignored": lambda s: {"target": labels(s, slice(s[0] // 2 + 1)), "weight": class_weights(s)},
    "labels all ignored": lambda s: {"target": labels(s, slice(None))},
    "labels smoothed": lambda s: {"target": labels(s), "weight": class_weights(s), "label_smoothing": 0.1},
    "labels uint8": lambda s: {"target": labels(s, slice(0)).byte(), "weight": class_weights(s), "ignore_index": 2},
    "probabilities": lambda s: {"target": grad(torch.rand(s))},
    "probabilities smoothed": lambda s: {
        "target": grad(torch.rand(s)),
        "weight": grad(class_weights(s)),
        "label_smoothing": 0.1,
    },
}
PROBABILITIES_ASKED = {
    "plain": lambda s: {"target": grad(torch.rand(s))},
    "bool": lambda s: {"target": torch.rand(s) < 0.5},
    "weight by column": lambda s: {"target": torch.rand(s), "weight": grad(torch.rand(s[-1:]))},
    "weight by row": lambda s: {"target": torch.rand(s), "weight": grad(torch.rand(s[:-1] + (1,) * len(s[-1:])))},
    "weight by element": lambda s: {"target": torch.rand(s), "weight": grad(torch.rand(s))},
}
LOGITS_ASKED = PROBABILITIES_ASKED | {
    "pos_weight": lambda s: {
        "target": grad(torch.rand(s)),
        "weight": torch.rand(s[:1] + (1,) * len(s[1:])),
        "pos_weight": grad(torch.rand(s[-1:])),
    },
}
CASES = {
    f"{loss}-{asked}-{'x'.join(map(str, shape))}-{placed}": (loss, make, shape, placed.split())
    for loss, asks, shapes in (
        (CE, CE_ASKED, CE_PLACED),
        (LOGITS, LOGITS_ASKED, BCE_PLACED),
        (PROBABILITIES, PROBABILITIES_ASKED, BCE_PLACED),
    )
    for asked, make in asks.items()
    for shape, placements in shapes.items()
    for placed in placements
}


# ---- one rank of four. torch.distributed.tensor is imported here and not above: cece must do without.


def placements_of(codes):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return tuple({"R": Replicate, "P": Partial}[c]() if c in "RP" else Shard(int(c[1:])) for c in codes)


def distribute(t, mesh, codes):
    """t as a leaf. A partial sum is t on one rank and 0 on the others."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = distribute_tensor(t.detach().clone(), mesh, placements_of("R" if c == "P" else c for c in codes))
    has_it = not any(i for i, c in zip(mesh.get_coordinate(), codes, strict=True) if c == "P")
    d = DTensor.from_local(
        whole.to_local() * has_it, mesh, placements_of(codes), shape=whole.shape, stride=whole.stride()
    )
    return d.requires_grad_(t.requires_grad)


def without_classes(codes):
    return [{"S0": "S0", "S2": "S1", "S3": "S2"}.get(c, "R") for c in codes]


def rows_placed(loss, shape, codes):
    if len(shape) == 1 and loss == CE:
        return ["R"] * len(codes)
    return without_classes(codes) if loss == CE else ["R" if c == "P" else c for c in codes]


def argument_placed(loss, name, t, shape, codes):
    """Where a user would put it: beside input's rows."""
    if name == "input" or t.shape == shape:
        return codes
    return rows_placed(loss, shape, codes) if name == "target" else ["R"] * len(codes)


def derive(loss, tensors):
    value = loss(**tensors)
    if value.dim():
        factor = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        mesh = getattr(value, "device_mesh", None)
        (value * (distribute(factor, mesh, ["R"] * mesh.ndim) if mesh else factor)).sum().backward()
    else:
        value.backward()
    return {"loss": value.detach()} | {name: t.grad for name, t in tensors.items() if t.requires_grad}


def check_case(meshes, loss, make, shape, codes):
    mesh = meshes[len(codes)]
    torch.manual_seed(0)
    arguments = {"input": grad((torch.rand if loss == PROBABILITIES else torch.randn)(shape)), **make(shape)}
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    options = {k: v for k, v in arguments.items() if k not in tensors}
    beside = {k: argument_placed(loss, k, t, torch.Size(shape), codes) for k, t in tensors.items()}
    replicated = {k: codes if k == "input" else ["R"] * len(codes) for k in tensors}
    for reduction in REDUCTIONS:
        ours = functools.partial(getattr(cece, loss), reduction=reduction, **options)
        truth = derive(ours, {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in tensors.items()})
        for placed in (beside, replicated):
            got = derive(ours, {k: distribute(t, mesh, placed[k]) for k, t in tensors.items()})
            assert got.keys() == truth.keys()
            for k, value in got.items():
                what = f"{reduction}, {placed}, {k}"
                if k == "loss":
                    codes_of = rows_placed(loss, shape, codes) if reduction == "none" else ["R"] * len(codes)
                else:
                    codes_of = ["R" if c == "P" else c for c in placed[k]]
                assert value.placements == placements_of(codes_of), f"{what}: {value.placements}"
                assert (value.shape, value.dtype) == (truth[k].shape, truth[k].dtype), what
                torch.testing.assert_close(
                    value.full_tensor(), truth[k], rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"{{}}\n{what}".format
                )
        # torch's own mean over sharded labels averages the ranks' means, or refuses shards that are uneven
        with_grad = {k: t.detach() for k, t in tensors.items()}
        if loss == CE and (reduction != "mean" or "label" not in str(tensors["target"].dtype)):
            del with_grad


def run_rank(directory):
    import torch.distributed as dist
    from torch.distributed.tensor import init_device_mesh

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    meshes = {1: init_device_mesh("cpu", (RANKS,)), 2: init_device_mesh("cpu", (2, RANKS // 2))}
    results = {}
    for name, run in {k: functools.partial(check_case, meshes, *case) for k, case in CASES.items()}.items():
        try:
            results[name] = run()
        except Exception:
            results[name] = traceback.format_exc()
    (Path(directory) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Case -> what each rank has to say of it, None if all is well."""
    directory = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE), str(directory)],
            env={**os.environ, "RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [p.communicate(timeout=SECONDS)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    files = [directory / f"{rank}.json" for rank in range(RANKS)]
    assert all(f.is_file() for f in files), "\n".join(said)
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("case", CASES)
def test_same_as_one_process(case, outcomes):
    for rank, said in enumerate(outcomes):
        assert said[case] is None, f"rank {rank}: {said[case]}"


if __name__ == "__main__":
    run_rank(sys.argv[1])
