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


def check_compiled(_):
    both = torch.randn(RANKS, 2)
    mine = mine_of(both).requires_grad_()
    value = torch.compile(softmax_cubed_across, fullgraph=True, backend="aot_eager")(mine)
    torch.testing.assert_close(value, softmax_cubed(both))
    value.backward()
    torch.testing.assert_close(mine.grad, mine_of(torch.func.grad(softmax_cubed)(both)))
    eager, mine.grad = mine.grad, None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        softmax_cubed_across(mine).backward()
    torch.testing.assert_close(mine.grad, eager)


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
