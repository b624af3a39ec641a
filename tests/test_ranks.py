"""Sums over ranks as derivatives need them (csrc/ranks.h): every order of derivative is that of one process."""

import processes
import pytest
import torch
from torch.library import opcheck

import cece  # noqa: F401

ACROSS = torch.ops.cece.across_ranks.default
RANKS = 3
KINDS = {"for_shards": (True, True), "of_shards": (True, False), "copy": (False, True)}  # sum, sum_gradient


@pytest.mark.parametrize("kind", KINDS)
def test_operator(kind):
    x = torch.randn(3, 2, requires_grad=True)
    opcheck(ACROSS, (x, 1, "", *KINDS[kind]))
    assert torch.equal(ACROSS(x, 1, "", *KINDS[kind]), x)
    batched = torch.vmap(lambda x: ACROSS(x, 1, "", *KINDS[kind]), in_dims=1, out_dims=1)(x)
    assert torch.equal(batched, x)


# ---- one rank of three


def across(x, kind):
    import torch.distributed as dist

    return ACROSS(x, RANKS, dist.group.WORLD.group_name, *KINDS[kind])


def softmax_cubed(x):  # columns of (ranks, 2) are distributions, of which a rank has one number each
    return ((x.exp() / x.exp().sum(0)) ** 3).sum()


def softmax_cubed_across(x):
    return across((x.exp() / across(x.exp(), "for_shards")) ** 3, "of_shards").sum()


def mine_of(all_ranks):
    import torch.distributed as dist

    return all_ranks[dist.get_rank()]


def check_three_orders(_):
    both = torch.randn(RANKS, 2, dtype=torch.float64, requires_grad=True)
    mine = mine_of(both).detach().requires_grad_()
    value, truth = softmax_cubed_across(mine), softmax_cubed(both)
    for _ in range(3):
        torch.testing.assert_close(value, truth)
        (g,) = torch.autograd.grad(value, mine, create_graph=True)
        (t,) = torch.autograd.grad(truth, both, create_graph=True)
        torch.testing.assert_close(g, mine_of(t))
        value, truth = across((g**2).sum(), "of_shards"), (t**2).sum()


def check_copies(_):
    w = torch.rand(2, dtype=torch.float64, requires_grad=True)
    both = torch.randn(RANKS, 2, dtype=torch.float64, requires_grad=True)
    mine = mine_of(both).detach().requires_grad_()
    value, truth = across((across(w, "copy") * mine).sin().sum(), "of_shards"), (w * both).sin().sum()
    for _ in range(3):
        g, h = torch.autograd.grad(value, (w, mine), create_graph=True)
        t, u = torch.autograd.grad(truth, (w, both), create_graph=True)
        torch.testing.assert_close(g, t)
        torch.testing.assert_close(h, mine_of(u))
        value, truth = (g**2).sum() + across((h**2).sum(), "of_shards"), (t**2).sum() + (u**2).sum()


def check_transforms(_):
    both, v = torch.randn(2, RANKS, 2, dtype=torch.float64)
    mine, of_mine = mine_of(both), mine_of(v)
    torch.testing.assert_close(
        torch.func.grad(softmax_cubed_across)(mine), mine_of(torch.func.grad(softmax_cubed)(both))
    )
    tangent = torch.func.jvp(softmax_cubed_across, (mine,), (of_mine,))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(softmax_cubed, (both,), (v,))[1])
    tangent = torch.func.jvp(torch.func.grad(softmax_cubed_across), (mine,), (of_mine,))[1]
    torch.testing.assert_close(tangent, mine_of(torch.func.jvp(torch.func.grad(softmax_cubed), (both,), (v,))[1]))
    batched = torch.vmap(lambda x: across(x, "of_shards"))(both)
    torch.testing.assert_close(batched, RANKS * both)


# ---- KL divergence of sharded classes


CUTS = [4, 0, 3]


def sharded_kl(x, y, mask=None):
    import torch.distributed as dist

    group = dist.group.WORLD.group_name
    return torch.ops.cece.sharded_divergence_forward(x, y, mask, 1.5, RANKS, group)[0]


def whole_kl(x, y, mask=None):
    return cece.kl_divergence(x, y, mask=mask, temperature=1.5, reduction="none")


def rows(dtype=torch.float64):
    return torch.randn(2, 4, sum(CUTS), 2, dtype=dtype)


def shard(t):
    return mine_of(t.split(CUTS, 1))


def check_divergence(_):
    """Bit for bit the same on every rank, and what one process has to the last digits of float32."""
    import torch.distributed as dist

    for masked in (False, True):
        x, y = rows(torch.float32)
        mask = torch.rand(4, 2) < 0.5 if masked else None
        true = torch.func.grad_and_value(lambda *t, mask=mask: whole_kl(*t, mask).sum(), (0, 1))(x, y)
        ours = torch.func.grad_and_value(lambda *t, mask=mask: sharded_kl(*t, mask).sum(), (0, 1))(shard(x), shard(y))
        torch.testing.assert_close(ours, (tuple(map(shard, true[0])), true[1]))
        mine = sharded_kl(shard(x), shard(y), mask)
        every = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(every, mine)
        assert all(torch.equal(t, mine) for t in every)


def check_divergence_three_orders(_):
    """Derivatives in both logits and in the incoming gradient, with rows left out that hold NaN, certain rows, and
    classes ruled out."""
    x, y = rows()
    x[0, 1, 0] = torch.inf
    y[0, 1, 0] = torch.inf
    y[1, 3] = -torch.inf
    x[2, :, 0] = torch.nan
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[2, 0] = False
    g = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    one = x.requires_grad_(), y.requires_grad_(), g
    many = shard(x).detach().requires_grad_(), shard(y).detach().requires_grad_(), g
    truth, value = (whole_kl(*one[:2], mask) * g).sum(), (sharded_kl(*many[:2], mask) * g).sum()
    for order in range(3):
        torch.testing.assert_close(value, truth)
        true = torch.autograd.grad(truth, one, create_graph=True)
        ours = torch.autograd.grad(value, many, create_graph=True)
        for a, b in zip(ours, (shard(true[0]), shard(true[1]), true[2]), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, order=order: f"order {order}: {m}")
        truth = sum((t**2).sum() for t in true)
        value = across(sum((t**2).sum() for t in ours[:2]), "of_shards") + (ours[2] ** 2).sum()


def check_divergence_transforms(_):
    x, y = rows()
    v, w = rows()
    ours = torch.func.jvp(sharded_kl, (shard(x), shard(y)), (shard(v), shard(w)))[1]
    torch.testing.assert_close(ours, torch.func.jvp(whole_kl, (x, y), (v, w))[1])
    slopes = [torch.func.grad(lambda x, y, f=f: f(x, y).sum(), (0, 1)) for f in (sharded_kl, whole_kl)]
    ours = torch.func.jvp(slopes[0], (shard(x), shard(y)), (shard(v), shard(w)))[1]
    for a, b in zip(ours, torch.func.jvp(slopes[1], (x, y), (v, w))[1], strict=True):
        torch.testing.assert_close(a, shard(b))
    torch.testing.assert_close(torch.vmap(sharded_kl, 2, 1)(shard(x), shard(y)), torch.vmap(whole_kl, 2, 1)(x, y))


def check_compiled(_):
    """In one piece, and its backward by compiled autograd."""
    x, y = rows(torch.float32)
    mine, y_mine = shard(x).requires_grad_(), shard(y)

    def many(x):
        return sharded_kl(x, y_mine).sum() + across(x.exp().sum(1), "of_shards").sum()

    def one(x):
        return whole_kl(x, y).sum() + x.exp().sum()

    value = torch.compile(many, fullgraph=True, backend="aot_eager")(mine)
    torch.testing.assert_close(value, one(x))
    value.backward()
    torch.testing.assert_close(mine.grad, shard(torch.func.grad(one)(x)))
    compiled, mine.grad = mine.grad, None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        many(mine).backward()
    torch.testing.assert_close(mine.grad, compiled)


def check_bytes_of_a_divergence(_):
    """7 numbers a row, once, and nothing on the way back."""
    x, y = rows(torch.float32)
    mine = shard(x).requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        sharded_kl(mine, shard(y)).sum().backward()
    exchanges = [e for e in profile.events() if e.name.startswith("_c10d_functional::") and "wait" not in e.name]
    assert [(e.name.split("::")[1], e.input_shapes[0]) for e in exchanges] == [("all_gather_into_tensor", [1, 7, 4, 2])]


def check_divergence_as_a_function(_):
    """cece.distributed.kl_divergence: its reductions, another dimension of classes, and what it refuses."""
    from cece.distributed import kl_divergence

    x, y = rows(torch.float32)
    mask, w = torch.rand(4, 2) < 0.7, torch.rand(4, 2)
    for options in (
        {},
        {"reduction": "none", "temperature": 3},
        {"reduction": "sum", "mask": mask},
        {"reduction": "batchmean", "token_weight": w},
        {"mask": mask, "token_weight": w},
        {"normalizer": torch.tensor(7.0)},
    ):
        whole = cece.kl_divergence(x, y, **options)
        for classes in (None, CUTS):
            torch.testing.assert_close(kl_divergence(shard(x), shard(y), classes=classes, **options), whole)
    last = shard(x).movedim(1, -1), shard(y).movedim(1, -1)
    torch.testing.assert_close(kl_divergence(*last, dim=-1, classes=CUTS), cece.kl_divergence(x, y))
    torch.testing.assert_close(
        kl_divergence(shard(x[0, :, 0][None])[0], shard(y[0, :, 0][None])[0], classes=CUTS),
        cece.kl_divergence(x[0, :, 0], y[0, :, 0]),
    )
    for error, words, call in (
        (ValueError, "logits must have this rank's classes", lambda: kl_divergence(x, y, classes=CUTS)),
        (
            ValueError,
            "temperature must be a finite number above 0",
            lambda: kl_divergence(shard(x), shard(y), classes=CUTS, temperature=0),
        ),
        (TypeError, "target_logits must be a torch.Tensor, got list", lambda: kl_divergence(shard(x), [1])),
        (ValueError, "reduction must be", lambda: kl_divergence(shard(x), shard(y), classes=CUTS, reduction="max")),
    ):
        with pytest.raises(error, match=words):
            call()


def check_nothing_to_add(_):
    assert across(torch.empty(0, 2), "for_shards").shape == (0, 2)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.outcomes_of(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(check, outcomes):
    processes.assert_well(check, outcomes)


if __name__ == "__main__":
    import sys

    processes.run_rank(sys.argv[1], RANKS, CHECKS, lambda: None)
