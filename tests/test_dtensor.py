"""DTensors: the loss, its placement and every gradient are those of one process. Real processes, joined by gloo.

This file is also the program of a rank (processes.py).
"""

import functools
import subprocess
import sys

import processes
import pytest
import torch
import torch.nn.functional as F

import cece

RANKS = 4  # a mesh of 4, and one of 2 x 2
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


def check_case(meshes, case):
    loss, make, shape, codes = case
    mesh = meshes[len(codes)]
    arguments = {"input": grad((torch.rand if loss == PROBABILITIES else torch.randn)(shape)), **make(shape)}
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    options = {k: v for k, v in arguments.items() if k not in tensors}
    beside = {k: argument_placed(loss, k, t, torch.Size(shape), codes) for k, t in tensors.items()}
    replicated = {k: codes if k == "input" else ["R"] * len(codes) for k in tensors}
    for reduction in REDUCTIONS:
        ours = functools.partial(getattr(cece, loss), reduction=reduction, **options)
        truth = derive(ours, {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in tensors.items()})
        for placed in (beside, replicated) if reduction == "mean" else (beside,):
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


# ---- what is not a table of shapes


def check_agrees_with_torch(meshes):
    """Where torch's own is right. Of a mean over sharded rows only that of class probabilities is: with labels, and
    elementwise, torch averages the ranks' means or refuses uneven shards, and the gradient of its
    binary_cross_entropy is too large by the number of shards."""
    shape, column = (8, 6), torch.rand(6)
    for loss, target, weights in (
        (CE, labels(shape), {}),
        (CE, labels(shape), {"weight": column}),
        (CE, torch.rand(shape), {"weight": column}),
        (LOGITS, torch.rand(shape), {"weight": column, "pos_weight": column}),
        (PROBABILITIES, torch.rand(shape), {"weight": column}),
    ):
        for codes in (["S0"], ["S0", "R"], ["R", "R"]):
            for reduction in REDUCTIONS:
                if reduction == "mean" and "S0" in codes and not (loss == CE and target.dim() == 2):
                    continue
                mesh, replicated = meshes[len(codes)], ["R"] * len(codes)
                results = []
                for module in (cece, F):
                    x = distribute(grad(torch.linspace(0.1, 0.9, 48).reshape(shape)), mesh, codes)
                    factors = {k: distribute(t, mesh, replicated) for k, t in weights.items()}
                    value = getattr(module, loss)(x, distribute(target, mesh, codes), reduction=reduction, **factors)
                    value.sum().backward()
                    results.append((value.full_tensor(), x.grad.full_tensor()))
                torch.testing.assert_close(*results, msg=f"{{}}\n{loss}, {codes}, {reduction}".format)


def check_mixed_arguments_are_named(meshes):
    x = torch.rand(8, 6)
    for loss, tensors in (
        (CE, {"input": x, "target": labels((8, 6)), "weight": x[0]}),
        (LOGITS, {"input": x, "target": x, "weight": x, "pos_weight": x[0]}),
        (PROBABILITIES, {"input": x, "target": x, "weight": x}),
    ):
        d = {k: distribute(t, meshes[1], ["R"]) for k, t in tensors.items()}
        for name, t in tensors.items():
            with pytest.raises(RuntimeError, match=f"cece.{loss}: got mixed .*: {name} must be a DTensor, as"):
                getattr(cece, loss)(**d | {name: t})
            if name != "input":
                with pytest.raises(RuntimeError, match=f"cece.{loss}: {name} must be on input's mesh"):
                    getattr(cece, loss)(**d | {name: distribute(t, meshes[2], ["R", "R"])})
    with pytest.raises(TypeError, match="target must be a torch.Tensor, got list"):
        cece.cross_entropy(distribute(x, meshes[1], ["R"]), [1] * 8)


def check_plain_tensors_torch_takes(meshes):
    from torch.distributed.tensor.experimental import implicit_replication

    x, weight = torch.rand(8, 6), torch.rand(6)
    d = distribute(x, meshes[1], ["S0"])
    loss = cece.binary_cross_entropy_with_logits(d, d, torch.tensor(2.0))
    torch.testing.assert_close(loss.full_tensor(), cece.binary_cross_entropy_with_logits(x, x, torch.tensor(2.0)))
    with implicit_replication():
        loss = cece.cross_entropy(d, labels((8, 6), slice(0)) * 0, weight)
    torch.testing.assert_close(loss.full_tensor(), cece.cross_entropy(x, torch.zeros(8).long(), weight))


def check_wrong_shapes_raise_on_every_rank(meshes):
    """Also where a rank's own shards would fit each other: 5 and 6 rows are both 2 on the first."""
    x = distribute(torch.rand(5, 6), meshes[1], ["S0"])
    with pytest.raises(ValueError, match=r"input is \[5, 6\], so class indices must have shape \[5\]"):
        cece.cross_entropy(x, distribute(labels((6, 6)), meshes[1], ["S0"]))
    with pytest.raises(RuntimeError, match="weight tensor should be defined either for all 6 classes"):
        cece.cross_entropy(
            x, distribute(labels((5, 6)), meshes[1], ["S0"]), distribute(torch.rand(5), meshes[1], ["R"])
        )
    with pytest.raises(ValueError, match=r"Target size \(\[6, 6\]\) must be the same as input size \(\[5, 6\]\)"):
        cece.binary_cross_entropy(x, distribute(torch.rand(6, 6), meshes[1], ["S0"]))
    for shape in ((6, 6), (5,), (1, 5, 6)):
        with pytest.raises(RuntimeError, match=r"weight must be broadcastable to input's shape \[5, 6\]"):
            cece.binary_cross_entropy(x, x, distribute(torch.rand(shape), meshes[1], ["R"]))


def check_second_derivatives(meshes):
    d = distribute(grad(torch.ones(1)), meshes[1], ["R"])
    if torch.autograd.grad(d.to_local() ** 2, d, create_graph=True)[0].grad_fn is None:
        return  # an older torch, whose to_local has a first derivative only
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.rand(5, 6, dtype=torch.float64)
    for loss, target in ((CE, labels((5, 6))), (CE, y), (LOGITS, y), (PROBABILITIES, y)):
        for codes in (["S0"], ["S1"], ["R"], ["S0", "R"]):
            for reduction in REDUCTIONS:

                def second(place, loss=loss, target=target, reduction=reduction):
                    d = place(grad(x))
                    value = getattr(cece, loss)(d, place(target), reduction=reduction)
                    (g,) = torch.autograd.grad((value * value).sum(), d, create_graph=True)
                    return torch.autograd.grad((g * g * g).sum(), d)[0]

                def place(t, codes=codes):
                    own = codes if t.dim() == 2 else rows_placed(CE, (5, 6), codes)
                    return distribute(t, meshes[len(codes)], own)

                truth = second(lambda t: t.detach().requires_grad_(t.requires_grad))
                torch.testing.assert_close(second(place).full_tensor(), truth)


def check_a_model_learns(meshes):
    """Modules, weights as buffers, replicated parameters, and a loss that prints."""
    from torch.distributed.tensor import distribute_module

    torch.manual_seed(0)
    x, target, weight = torch.randn(7, 6), labels((7, 3)), torch.rand(3)
    model = torch.nn.Linear(6, 3)
    cece.CrossEntropyLoss(weight)(model(x), target).backward()
    truth = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model = distribute_module(model, meshes[1])
    loss = distribute_module(cece.CrossEntropyLoss(weight), meshes[1])
    value = loss(model(distribute(x, meshes[1], ["S0"])), distribute(target, meshes[1], ["S0"]))
    assert value.item() == value.full_tensor().item()
    value.backward()
    for p, t in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), t)


def check_without_gradients(meshes):
    x, target = torch.rand(5, 6), labels((5, 6))
    truth = cece.cross_entropy(x, target)
    d, t = distribute(x, meshes[1], ["S0"]), distribute(target, meshes[1], ["S0"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(cece.cross_entropy(d, t).full_tensor(), truth)


def check_logits_not_overwritten(meshes):
    x = distribute(grad(torch.rand(8, 6)), meshes[1], ["S0"])
    before = x.full_tensor().detach().clone()
    cece.cross_entropy(x, distribute(labels((8, 6)), meshes[1], ["S0"]), inplace_backward=True).backward()
    assert torch.equal(x.full_tensor(), before) and x.grad.full_tensor().any()


def check_input_still_on_its_way(meshes):
    from torch.distributed.tensor import Replicate

    x, target = torch.rand(8, 6), labels((8, 6))
    d = distribute(grad(x), meshes[1], ["S0"])
    late = d.redistribute(placements=[Replicate()], async_op=True)
    loss = cece.cross_entropy(late, distribute(target, meshes[1], ["R"]))
    torch.testing.assert_close(loss.full_tensor(), cece.cross_entropy(x, target))
    loss.backward()
    x = x.detach().requires_grad_()
    cece.cross_entropy(x, target).backward()
    torch.testing.assert_close(d.grad.full_tensor(), x.grad)


def check_strided_shards(meshes):
    """What FSDP after tensor parallelism makes of a dimension."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    x, target = torch.randn(2, 6, 8), labels((2, 6, 8))
    d = distribute_tensor(x, meshes[2], [_StridedShard(2, split_factor=2), Shard(2)])
    loss = cece.cross_entropy(d, distribute(target, meshes[2], ["S1", "R"]), reduction="none")
    torch.testing.assert_close(loss.full_tensor(), cece.cross_entropy(x, target, reduction="none"))


def family():
    """Calls on (8, 6) logits, with what they are given; a result, or several."""
    rows = {"labels": labels((8, 6)), "factor": grad(torch.rand(8)), "mask": torch.rand(8) < 0.7}
    given = {"x": grad(torch.randn(8, 6)), "y": grad(torch.randn(8, 6)), **rows}
    given |= {"hidden": grad(torch.randn(8, 4)), "matrix": grad(torch.randn(6, 4)), "bias": grad(torch.randn(6))}
    given |= {"weight": torch.rand(6), "total": grad(torch.tensor(3.0))}
    masked = torch.randn(8, 6)
    masked[1] = -torch.inf
    given |= {"masked": grad(masked), "probabilities": torch.rand(8, 6)}
    calls = {
        "z-loss": lambda a, r: cece.cross_entropy(a["x"], a["labels"], a["weight"], reduction=r, z_loss=0.1),
        "capped": lambda a, r: cece.cross_entropy(
            a["x"], a["probabilities"], reduction=r, logit_scale=0.7, softcap=2.0, token_weight=a["factor"]
        ),
        "masked rows": lambda a, r: cece.cross_entropy(a["masked"], a["labels"], reduction=r, skip_masked_rows=True),
        "smoothed": lambda a, r: cece.cross_entropy(
            a["x"], a["labels"], a["weight"], reduction=r, label_smoothing=0.1, token_weight=a["factor"]
        ),
        "kl": lambda a, r: cece.kl_divergence(a["x"], a["y"], reduction=r, temperature=2.0, token_weight=a["factor"]),
        "kl, masked": lambda a, r: cece.kl_divergence(a["x"], a["y"], reduction=r, mask=a["mask"]),
        "js": lambda a, r: cece.js_divergence(a["x"], a["y"], reduction=r, mask=a["mask"]),
        "linear": lambda a, r: cece.linear_cross_entropy(
            a["hidden"], a["matrix"], a["labels"], linear_bias=a["bias"], weight=a["weight"], reduction=r
        ),
        "linear, factors": lambda a, r: cece.linear_cross_entropy(
            a["hidden"], a["matrix"], a["probabilities"], reduction=r, token_weight=a["factor"], label_smoothing=0.1
        ),
    }
    for r in REDUCTIONS:
        yield from ((f"{name}, {r}", functools.partial(call, r=r), given) for name, call in calls.items())
    yield "batchmean", lambda a: cece.kl_divergence(a["x"], a["y"], reduction="batchmean", mask=a["mask"]), given
    yield "normalizer", lambda a: cece.cross_entropy(a["x"], a["labels"], normalizer=a["total"]), given
    yield "normalizer, kl", lambda a: cece.kl_divergence(a["x"], a["y"], normalizer=7.0), given
    yield (
        "normalizer, linear",
        lambda a: cece.linear_cross_entropy(a["hidden"], a["matrix"], a["labels"], normalizer=a["total"]),
        given,
    )
    asked = {"entropy": True, "logsumexp": True, "collision": True}
    yield "statistics", lambda a: cece.token_statistics(a["x"], a["labels"], temperature=0.5, **asked)[:4], given
    yield (
        "linear statistics",
        lambda a: cece.linear_token_statistics(a["hidden"], a["matrix"], a["labels"], **asked)[:4],
        given,
    )
    yield "entropy", lambda a: cece.entropy(a["x"], dim=-1), given


def derive_all(call, given):
    values = call(given)
    values = list(values) if isinstance(values, tuple) else [values]
    wanted = {k: t for k, t in given.items() if t.requires_grad}
    total = 0.0
    for v in values:
        factor = torch.linspace(0.5, 2, 8)[: v.numel()].reshape(v.shape)
        mesh = getattr(v, "device_mesh", None)
        total = total + (v * (distribute(factor, mesh, ["R"] * mesh.ndim) if mesh else factor)).sum()
    return values, dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), allow_unused=True), strict=True))


def check_the_family(meshes):
    """Values, gradients, and where both are placed; rows and classes cut, uneven and empty parts."""
    torch.manual_seed(1)
    cases = list(family())
    for codes in (["S0"], ["S1"], ["P"], ["S0", "S1"], ["S1", "S0"], ["R", "S1"], ["S1", "S1"]):
        mesh, rows = meshes[len(codes)], without_classes(codes)
        classes = ["S0" if c == "S1" else "R" for c in codes]
        placed = {"x": codes, "y": codes, "masked": codes, "probabilities": codes, "hidden": rows, "matrix": classes}
        if "P" in codes:  # 0 times -inf is no partial sum
            placed["masked"] = ["R"]
        placed |= {"labels": rows, "factor": rows, "mask": rows, "bias": classes, "weight": classes}
        for name, call, given in cases:
            truth, slopes = derive_all(call, given)
            ours = {k: distribute(t, mesh, placed.get(k, ["R"] * len(codes))) for k, t in given.items()}
            values, gradients = derive_all(call, ours)
            for value, true in zip(values, truth, strict=True):
                what = f"{name}, {codes}"
                own = rows if true.dim() else ["R"] * len(codes)
                assert value.placements == placements_of(own), f"{what}: {value.placements}"
                torch.testing.assert_close(value.full_tensor(), true, equal_nan=True, msg=f"{{}}\n{what}".format)
            for k, true in slopes.items():
                assert (gradients[k] is None) == (true is None), f"{what}, {k}"
                if true is not None:
                    own = placements_of("R" if c == "P" else c for c in placed.get(k, ["R"] * len(codes)))
                    assert gradients[k].placements == own, f"{what}, {k}: {gradients[k].placements}"
                    torch.testing.assert_close(
                        gradients[k].full_tensor(), true, rtol=1e-5, atol=1e-6, msg=f"{{}}\n{what}, {k}".format
                    )


def check_argmax_and_top_k(meshes):
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    y = y.log_softmax(1)
    for codes in (["S0"], ["S1"], ["S0", "S1"]):
        mesh, rows = meshes[len(codes)], without_classes(codes)
        d = distribute(x, mesh, codes)
        assert torch.equal(cece.token_statistics(d, argmax=True).argmax.full_tensor(), x.argmax(1))
        top = y.topk(3)
        alone = [c if c == "S0" else "R" for c in codes]
        values, indices = (distribute(t, mesh, alone) for t in top)
        ours = cece.kl_divergence(d, values, target_indices=indices, reduction="none")
        assert ours.placements == placements_of(rows)
        torch.testing.assert_close(
            ours.full_tensor(), cece.kl_divergence(x, top[0], target_indices=top[1], reduction="none")
        )


def check_classes_last_and_a_plain_normalizer(meshes):
    x, y = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    total = grad(torch.tensor(7.0))
    for codes in (["S2"], ["S0", "S2"], ["S2", "S1"]):
        mesh, rows = meshes[len(codes)], ["R" if c == "S2" else c for c in codes]
        d, e = (distribute(t, mesh, codes) for t in (x, y))
        ours = cece.kl_divergence(d, e, dim=-1, reduction="none")
        assert ours.placements == placements_of(rows)
        torch.testing.assert_close(ours.full_tensor(), cece.kl_divergence(x, y, dim=-1, reduction="none"))
        mean, truth = (cece.kl_divergence(a, b, dim=-1, normalizer=total) for a, b in ((d, e), (x, y)))
        torch.testing.assert_close(mean.full_tensor(), truth)
        slopes = [torch.autograd.grad(v, total)[0] for v in (mean, truth)]
        torch.testing.assert_close(*slopes)
        with pytest.raises(ValueError, match="normalizer is what 'mean' divides by"):
            cece.kl_divergence(d, e, dim=-1, normalizer=total, reduction="sum")


def check_cut_classes_are_not_gathered(meshes):
    """What goes over the wire is 16 bytes a row, and nothing on the way back."""
    d = distribute(grad(torch.randn(8, 64)), meshes[1], ["S1"])
    target = torch.randint(64, (8,))
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        cece.cross_entropy(d, target, reduction="sum").backward()
    sent = [e.input_shapes[0] for e in profile.function_events if e.name.startswith("_c10d_functional::all")]
    assert sent == [[1, 4, 8]], sent


def check_loss_parallel(meshes):
    """torch's own function and module, patched, within and without; plain labels, as torch takes them there."""
    from torch.distributed.tensor.parallel import loss_parallel

    x, target, weight = torch.randn(8, 6), labels((8, 6)), torch.rand(6)
    for codes, labels_placed in ((["S1"], None), (["R", "S1"], None), (["S0", "S1"], ["S0", "R"])):
        mesh = meshes[len(codes)]
        for reduction in REDUCTIONS:
            plain = x.detach().clone().requires_grad_()
            truth = F.cross_entropy(plain, target, weight, reduction=reduction)
            truth.sum().backward()
            t = distribute(target, mesh, labels_placed) if labels_placed else target
            for patched in (False, True):
                d = distribute(grad(x), mesh, codes)
                with loss_parallel():
                    if patched:
                        with cece.patch() as patch:
                            before = patch.calls["cross_entropy"].get("cece", 0)
                            value = torch.nn.CrossEntropyLoss(weight, reduction=reduction)(d, t)
                            assert patch.calls["cross_entropy"]["cece"] == before + 1, patch.calls
                    else:
                        value = cece.cross_entropy(d, t, weight, reduction=reduction)
                    value.sum().backward()
                own = without_classes(codes) if reduction == "none" else ["R"] * len(codes)
                assert value.placements == placements_of(own) and d.grad.placements == d.placements
                torch.testing.assert_close(value.full_tensor(), truth)
                torch.testing.assert_close(d.grad.full_tensor(), plain.grad)
    with loss_parallel(), pytest.raises(RuntimeError, match="target must be a DTensor"):
        cece.cross_entropy(distribute(x, meshes[2], ["S0", "S1"]), target)


def check_compiled_class_shards(meshes):
    x, target = torch.rand(8, 6), labels((8, 6))
    d, t = distribute(grad(x), meshes[1], ["S1"]), distribute(target, meshes[1], ["R"])
    compiled = torch.compile(lambda x, t: cece.cross_entropy(x, t), backend="aot_eager", fullgraph=True)
    compiled(d, t).backward()
    x = x.detach().requires_grad_()
    cece.cross_entropy(x, target).backward()
    torch.testing.assert_close(d.grad.full_tensor(), x.grad)


def check_labels_out_of_range_are_named(meshes):
    target = labels((8, 6))
    target[7] = 6
    with pytest.raises(IndexError, match=r"Target 6 is out of bounds: target\[7\]"):
        cece.check_targets(distribute(target, meshes[1], ["S0"]), 6)
    cece.check_targets(distribute(target, meshes[1], ["S0"]), 7)


def check_compiled(meshes):
    x, target = torch.rand(8, 6), labels((8, 6))
    d, t = distribute(grad(x), meshes[1], ["S0"]), distribute(target, meshes[1], ["S0"])
    compiled = torch.compile(lambda x, t: cece.cross_entropy(x, t), backend="aot_eager", fullgraph=True)
    compiled(d, t).backward()
    x = x.detach().requires_grad_()
    cece.cross_entropy(x, target).backward()
    torch.testing.assert_close(d.grad.full_tensor(), x.grad)


CHECKS = {name: functools.partial(check_case, case=case) for name, case in CASES.items()}
CHECKS |= {name: check for name, check in globals().items() if name.startswith("check_") and name != "check_case"}


def begin():
    from torch.distributed.tensor import init_device_mesh

    return {1: init_device_mesh("cpu", (RANKS,)), 2: init_device_mesh("cpu", (2, RANKS // 2))}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.outcomes_of(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(check, outcomes):
    processes.assert_well(check, outcomes)


def test_not_imported_for_plain_tensors():
    program = (
        "import sys, torch, cece;"
        "cece.cross_entropy(torch.nn.Parameter(torch.rand(3, 4)), torch.zeros(3).long(), torch.rand(4)).backward();"
        "cece.BCEWithLogitsLoss()(torch.rand(3), torch.rand(3)); cece.BCELoss()(torch.rand(3), torch.rand(3));"
        "print([m for m in sys.modules if m.startswith('torch.distributed.tensor')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], env=processes.environment(), capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


if __name__ == "__main__":
    processes.run_rank(sys.argv[1], RANKS, CHECKS, begin)
