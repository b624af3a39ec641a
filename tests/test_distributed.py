"""Rows whose classes are cut into shards: without processes (parts made one after another), and with them, on gloo."""

import functools
import itertools
import math

import processes
import pytest
import torch
from conftest import assert_as_good_as_torch, class_scale

import cece
from cece import reference

INF, NAN = float("inf"), float("nan")
ops = torch.ops.cece
NAMES = ["log_prob", "entropy", "logsumexp", "collision", "argmax"]


# ---- no processes: shards of one tensor


def class_dim(x):
    return min(1, x.dim() - 1)


class Cut:
    """Logits cut into shards of so many classes: what the ranks come to, shard after shard."""

    def __init__(self, x, target, weight, sizes, *, smoothing=0.0, scale=1.0, cap=0.0, skip=False, wanted=1):
        dim, self.all = class_dim(x), x.shape[class_dim(x)]
        soft = target is not None and target.dim() == x.dim()
        xs = x.split(sizes, dim)
        ts = target.split(sizes, dim) if soft else [target] * len(sizes)
        ws = weight.split(sizes) if weight is not None else [None] * len(sizes)
        self.dim, self.skip, self.options = dim, skip, (-100, smoothing, scale, cap)
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.shards = list(zip(xs, ts, ws, firsts, strict=True))
        full = wanted != 1 or target is None or scale != 1 or cap != 0 or skip
        self.parts = torch.stack(
            [ops.row_parts(x, t, w, *self.options, first, self.all, full) for x, t, w, first in self.shards]
        )
        self.labels = None if soft else target
        self.finish = lambda parts: ops.finish_parts(parts, self.labels, -100, smoothing, skip, self.all, wanted)
        *values, self.stats = self.finish(self.parts)
        self.values = {name: v for i, (name, v) in enumerate(zip(NAMES, values, strict=True)) if wanted >> i & 1}

    def gradient(self, *grads):
        return torch.cat([self.gradient_of(*shard, grads) for shard in self.shards], self.dim)

    def gradient_of(self, x, t, w, first, grads):
        if self.stats.shape[0] < 5:
            total, options = self.stats.new_ones(()), (0, *self.options[:2])
            return ops.cross_entropy_backward(grads[0], x, t, w, self.stats, total, *options, first, self.all)
        grads = [*grads, None, None, None][:4]
        return ops.token_statistics_backward(*grads, x, t, w, self.stats, *self.options, self.skip, first, self.all)


CUTS = {
    (7,): [3, 0, 4],
    (37, 5): [2, 0, 3],
    (300, 10): [3, 3, 3, 1],
    (19, 49): [20, 29],
    (5, 1024): [0, 1, 1023],
    (3, 2503): [1252, 1251, 0],
    (2, 5, 7): [1, 4],
    (2, 300, 9): [100, 0, 200],
    (2, 70001): [66000, 4001],
}
KINDS = ["labels", "smooth", "weighted", "weighted smooth", "soft", "soft weighted smooth"]


def of_kind(kind, x):
    dim = class_dim(x)
    if "soft" in kind:
        target = torch.randn(x.shape).softmax(dim).to(x.dtype)
    else:
        target = torch.randint(x.shape[dim], [n for d, n in enumerate(x.shape) if d != dim])
        if target.numel() > 2:
            target.view(-1)[1] = -100
    weight = torch.rand(x.shape[dim]) + 0.5 if "weighted" in kind else None
    return target, weight, 0.1 if "smooth" in kind else 0.0


@pytest.mark.parametrize("shape", CUTS, ids=str)
def test_loss_of_shards(backend, shape):
    """Every kind of target and dtype: loss, gradient and the weight that a mean divides by."""
    if backend.name != "cpu" and math.prod(shape) > 50000:
        return
    dtypes, kinds = [torch.float32, torch.bfloat16, torch.float64], KINDS
    if math.prod(shape) > 50000:
        dtypes, kinds = dtypes[:1], ["weighted smooth", "soft"]
    for dtype, kind in itertools.product(dtypes, kinds):
        x = (torch.randn(shape) * 4).to(dtype)
        target, weight, smoothing = of_kind(kind, x)
        truth_x = x.double().requires_grad_()
        truth_t = target.double() if target.is_floating_point() else target
        options = {"label_smoothing": smoothing, "reduction": "none"}
        truth = reference.cross_entropy(truth_x, truth_t, weight, **options)
        ours = Cut(*(None if t is None else t.to(backend.device) for t in (x, target, weight)), CUTS[shape],
                   smoothing=smoothing)  # fmt: skip
        what = f"{kind} {shape} {dtype}"
        scale = x.double().abs().max() if dtype == torch.float64 else 0.0
        assert_as_good_as_torch(ours.values["log_prob"], truth, scale=scale, what=what)
        g = torch.randn(truth.shape)
        slope = torch.autograd.grad(truth, truth_x, g.double())[0]
        tensors = {"input": x.double(), "target": truth_t, "weight": weight}
        scale = class_scale(tensors, "cross_entropy", g.double(), options)
        assert_as_good_as_torch(ours.gradient(g.to(ours.stats)), slope, scale=scale, what=f"gradient of {what}")
        if kind.startswith("weighted"):
            weights = torch.where(target == -100, 0, weight[target.clamp_min(0)])
            assert torch.equal(ours.stats[-1].cpu().float(), weights)


@pytest.mark.parametrize("shape", CUTS, ids=str)
def test_statistics_of_shards(backend, shape):
    if backend.name != "cpu" and math.prod(shape) > 50000:
        return
    for dtype, skip, cap in [(torch.float32, False, 0.0), (torch.bfloat16, True, 0.0), (torch.float64, True, 5.0)]:
        x, temperature = (torch.randn(shape) * 4).to(dtype), 0.8
        target, _, _ = of_kind("labels", x)
        dim = class_dim(x)
        truth_x = x.double().requires_grad_()
        z = truth_x / temperature
        truth = reference.token_statistics(cap * (z / cap).tanh() if cap else z, target, dim=dim)
        ours = Cut(x.to(backend.device), target.to(backend.device), None, CUTS[shape], scale=1 / temperature, cap=cap,
                   skip=skip, wanted=31)  # fmt: skip
        what, scale = f"{shape} {dtype}", truth_x.detach().abs().max() / temperature
        for name in NAMES[:4]:
            value = -ours.values[name] if name == "log_prob" else ours.values[name]
            tiny = name == "logsumexp" or dtype == torch.float64
            factor = truth[name].detach().abs() * scale / 2 if not tiny else scale
            assert_as_good_as_torch(value, truth[name], scale=factor, what=f"{name} {what}")
        used = target != -100
        assert torch.equal(ours.values["argmax"].cpu()[used], z.argmax(dim)[used])
        g = torch.randn(4, *target.shape)
        total = sum((truth[name] * a.double()).sum() for name, a in zip(NAMES[:4], g, strict=True))
        slope = torch.autograd.grad(total, truth_x)[0]
        found = ours.gradient(-g[0].to(ours.stats), *g[1:].to(ours.stats))
        assert_as_good_as_torch(found, slope, scale=40 * slope.abs().max(), what=f"gradient {what}")
        assert not found[(~used).unsqueeze(dim).expand(x.shape)].any()


def same(ours, truth):
    torch.testing.assert_close(ours.double(), truth.double(), rtol=2e-6, atol=1e-30, equal_nan=True)


ROWS = [
    [0, 1, 2, 3, 4, 5],
    [-INF, -INF, -INF, 3, 4, -INF],  # shards of nothing
    [-INF] * 6,
    [-INF, 1, INF, -INF, 0, 2],  # a certainty
    [INF, 1, 2, 3, INF, 0],  # two, in two shards
    [INF, INF, 2, 3, 1, 0],  # in one
    [0, 1, 2, NAN, 4, 5],
    [INF, 1, 2, NAN, 4, NAN],
    [1.5e38, -1.5e38, 0, 0, 1.5e38, -1.5e38],
    [-3.4028234663852886e38] + [-INF] * 5,
    [-INF] * 5 + [-3.4028234663852886e38],  # the lowest number of all, in the last shard
    [50, 50, 50, 50, 50, 50],  # ties
    [0, 90, 0, 0, 0, 0],  # losses of 1e-39
    [1e4, 1e4 - 60, 1e4 - 70, 1e4 - 65, 1e4 - 200, 1e4 - 60],
]


@pytest.mark.parametrize("sizes", [[2, 0, 1, 3], [1] * 6, [6]], ids=str)
def test_what_one_process_says(backend, sizes):
    """Infinities, NaN, ties, tiny losses, rows of nothing and ignored ones, whatever the shards."""
    x = torch.tensor(ROWS, device=backend.device)
    rows = len(ROWS)
    for label, skip, smoothing in itertools.product([0, 1, 4, -100], [False, True], [0.0, 0.25]):
        target = torch.full((rows,), label, device=backend.device)
        outs = ops.token_statistics_forward(x, target, None, -100, smoothing, 1.0, 0.0, skip, 31)
        cut = Cut(x, target, None, sizes, smoothing=smoothing, skip=skip, wanted=31)
        for name, truth in zip(NAMES, outs, strict=False):
            same(cut.values[name], truth)
        same(cut.stats[:5], outs[-1])
        g = torch.randn(4, rows, device=backend.device)
        truth = ops.token_statistics_backward(*g, x, target, None, outs[-1], -100, smoothing, 1.0, 0.0, skip)
        assert_as_good_as_torch(cut.gradient(*g), truth.cpu().double(), scale=20.0, what=f"{label} {skip} {smoothing}")
        if not skip:
            loss, stats, total = ops.cross_entropy_forward(x, target, None, 0, -100, smoothing)
            cut = Cut(x, target, None, sizes, smoothing=smoothing)
            same(cut.values["log_prob"], loss)
            truth = ops.cross_entropy_backward(g[0], x, target, None, stats, total, 0, -100, smoothing)
            assert_as_good_as_torch(cut.gradient(g[0]), truth.cpu().double(), scale=4.0, what=f"{label} {smoothing}")


def test_many_ranks(backend):
    """1024 shards of one class and of none: still exact, in the order of the classes, and the same each time."""
    x = torch.randn(3, 700, device=backend.device) * 8
    target = torch.tensor([699, 0, 350], device=backend.device)
    sizes = [1 if 100 <= i < 800 else 0 for i in range(1024)]
    cut = Cut(x, target, None, sizes, wanted=31)
    truth = reference.token_statistics(x.cpu().double(), target.cpu())
    for name in NAMES[:4]:
        value = -cut.values[name] if name == "log_prob" else cut.values[name]
        assert_as_good_as_torch(value, truth[name], scale=abs(truth[name]) * 2, what=name)
    assert torch.equal(cut.values["argmax"], x.argmax(1))
    assert torch.equal(torch.stack(cut.finish(cut.parts)[:4]), torch.stack(cut.finish(cut.parts)[:4]))


def test_classes_beyond_a_floats_integers(backend):
    """The index of the largest is exact where a float32 is not."""
    first, every = 2**24 + 1, 2**31 - 2
    x, labels = torch.tensor([[0.0, 1.0, 0.5]], device=backend.device), torch.tensor([2**24 + 3], device=backend.device)
    none = x[:, :0]
    parts = [
        ops.row_parts(s, labels, None, -100, 0.0, 1.0, 0.0, f, every, True)
        for s, f in [(none, 0), (x, first), (none, every)]
    ]
    loss, *_, argmax, stats = ops.finish_parts(torch.stack(parts), labels, -100, 0.0, False, every, 31)
    assert argmax.item() == 2**24 + 2
    same(loss.cpu(), torch.nn.functional.cross_entropy(x.cpu(), torch.tensor([2]), reduction="none"))


def test_labels_that_ranks_disagree_about(backend):
    """A data loader out of step: NaN wherever it can be seen, never a number of someone else's label."""
    x = torch.randn(4, 6, device=backend.device)
    mine, theirs = torch.tensor([[0, 1, -100, 5], [4, 0, 1, -100]], device=backend.device)
    w = torch.rand(6, device=backend.device)
    for weight, smoothing, full in itertools.product([None, w], [0.0, 0.3], [False, True]):
        parts = []
        for labels, first in [(mine, 0), (theirs, 3)]:
            shard = slice(first, first + 3)
            options = (-100, smoothing, 1.0, 0.0, first, 6, full)
            parts.append(ops.row_parts(x[:, shard], labels, None if weight is None else weight[shard], *options))
        for labels in mine, theirs:
            loss, *_, stats = ops.finish_parts(torch.stack(parts), labels, -100, smoothing, False, 6, 1)
            # Row 1: both have label 0 and 1 in the first shard, which only its owner reads.
            assert loss[[0, 2, 3]].isnan().all() and stats[2][[0, 2, 3]].isnan().all(), (weight, smoothing, full)


def test_impossible_labels(backend):
    x = torch.randn(2, 3, device=backend.device)
    target = torch.tensor([1, 6], device=backend.device)
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=r"Target 6 is out of bounds: target\[1\] must be in \[0, 6\)"):
            ops.row_parts(x, target, None, -100, 0.0, 1.0, 0.0, 0, 6, False)
        return
    loss = Cut(torch.cat([x, x], 1), target, None, [3, 3]).values["log_prob"]
    assert loss[0].isfinite() and loss[1].isnan()


def test_no_byte_beyond_a_shard(backend):
    """Sizes of what is exchanged, for a row: 16 bytes, 20 with class weights, 32 with all statistics."""
    x, y = torch.randn(2, 3, device=backend.device), torch.tensor([0, 5], device=backend.device)
    for weight, full, numbers in [(None, False, 4), (x[0], False, 5), (None, True, 8), (x[0], True, 8)]:
        parts = ops.row_parts(x, y, weight, -100, 0.0, 1.0, 0.0, 3, 6, full)
        assert parts.shape == (numbers, 2) and parts.dtype == torch.float32


def test_operators():
    """Fake kernels, autograd and tracing of each."""
    x, y, w = torch.randn(4, 5, 2), torch.randint(3, 8, (4, 2)), torch.rand(5)  # no NaN, which says: elsewhere
    for weight, full in (None, False), (w, True):
        parts = ops.row_parts(x, y, weight, -100, 0.1, 1.0, 0.0, 3, 11, full)
        torch.library.opcheck(torch.ops.cece.row_parts.default, (x, y, weight, -100, 0.1, 1.0, 0.0, 3, 11, full))
        args = parts[None], y, -100, 0.1, False, 11, 31 if full else 1
        torch.library.opcheck(torch.ops.cece.finish_parts.default, args)
    y = torch.randint(5, (4, 2))
    for weight, wanted in (w, 1), (None, 31):
        logits, options = x.clone().requires_grad_(), (-100, 0.1, 1.0, 0.0, False)
        one_rank = (0, 5, 1, "")
        torch.library.opcheck(
            torch.ops.cece.sharded_statistics_forward.default, (logits, y, weight, *options, wanted, *one_rank)
        )
        *_, stats = ops.sharded_statistics_forward(x, y, weight, *options, wanted, *one_rank)
        g = torch.randn(4, 2, requires_grad=True)
        if wanted == 1:
            args = g, logits, y, weight, stats, stats.new_ones(()), 0, *options[:2], *one_rank
            torch.library.opcheck(torch.ops.cece.cross_entropy_backward.default, args)
        else:
            args = g, None, g, None, logits, y, weight, stats, *options, *one_rank
            torch.library.opcheck(torch.ops.cece.token_statistics_backward.default, args)


# ---- processes: one rank of four, in groups of two, three and four


RANKS = 4


def begin():
    """The groups that this rank is of, by their size."""
    import torch.distributed as dist

    groups = {n: dist.new_group(list(range(n))) for n in (2, 3)}
    return {n: g for n, g in {**groups, 4: dist.group.WORLD}.items() if dist.get_rank() < n}


class Mine:
    """This rank's part of tensors that all ranks make alike."""

    def __init__(self, group, sizes):
        import torch.distributed as dist

        rank, self.group, self.sizes = dist.get_rank(group), group, sizes
        self.first, self.all = sum(sizes[:rank]), sum(sizes)
        self.slice = slice(self.first, self.first + sizes[rank])

    def of(self, t, dim):
        if t is None:
            return None
        part = t.detach().narrow(dim, self.first, self.slice.stop - self.first).clone()
        return part.requires_grad_(t.requires_grad)


def cuts_of(ranks):
    """Classes that the number of ranks does not divide; DTensor's cut of them; and shards of nothing."""
    each = -(-11 // ranks)
    even = [min(each, max(0, 11 - rank * each)) for rank in range(ranks)]
    uneven = [0, 10, 1, 0] if ranks > 2 else [0, 11]
    return [(even, 11), (uneven[:ranks], uneven[:ranks]), ([3, 8, 0, 0][:ranks], None)]


def assert_on_all(group, *tensors):
    """The same bits on every rank."""
    import torch.distributed as dist

    for t in tensors:
        every = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, t.detach().contiguous(), group=group)
        assert all(torch.equal(e.nan_to_num(), t.nan_to_num()) for e in every)


def each_cut(groups, few=False):
    for ranks, group in groups.items():
        for i, (sizes, classes) in enumerate(cuts_of(ranks)):
            if few and (ranks + i) % 2:
                continue
            torch.manual_seed(ranks)
            yield Mine(group, sizes), {"group": group, "classes": classes}


OPTIONS = [
    ("labels", {}),
    ("weighted", {}),
    ("weighted smooth", {"reduction": "sum"}),
    ("soft weighted smooth", {"reduction": "none"}),
    ("soft", {}),
    ("weighted smooth", {"z_loss": 0.1, "softcap": 3.0, "token_weight": True}),
    ("smooth", {"normalizer": 3.5, "logit_scale": 0.7, "skip_masked_rows": True}),
    ("weighted", {"token_weight": True, "skip_masked_rows": True}),
]


def check_every_option(groups):
    for mine, where in each_cut(groups):
        for (kind, options), shape in itertools.product(OPTIONS, [(6, 11), (2, 11, 3), (11,)]):
            options, dim = dict(options), min(1, len(shape) - 1)
            x = torch.randn(shape, dtype=torch.float64) * 3
            target, weight, smoothing = of_kind(kind, x)
            if options.pop("token_weight", False):
                options["token_weight"] = torch.rand(target.shape if "soft" not in kind else ())
            if options.get("skip_masked_rows"):
                x[0 if dim else slice(None)] = -INF
            x.requires_grad_()
            if "soft" in kind:
                target.requires_grad_()
                weight = weight if weight is None else weight.double().requires_grad_()
            truth = cece.cross_entropy(x, target, weight, label_smoothing=smoothing, **options)
            mx = mine.of(x, dim).float().detach().requires_grad_()
            mt = mine.of(target, dim) if "soft" in kind else target
            mw = mine.of(weight, 0)
            loss = cece.distributed.cross_entropy(mx, mt, mw, label_smoothing=smoothing, **options, **where)
            what = f"{kind} {options} {shape} {mine.sizes}"
            torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-12, equal_nan=True, msg=what)
            assert_on_all(mine.group, loss)
            pairs = [(mx, x, dim), (mt, target, dim), (mw, weight, 0)]
            ours, alls, dims = zip(*(p for p in pairs if p[1] is not None and p[1].requires_grad), strict=True)
            g = torch.randn(truth.shape, dtype=torch.float64)
            truths = torch.autograd.grad(truth, alls, g)
            found = torch.autograd.grad(loss, ours, g.to(loss))
            for a, b, d in zip(found, truths, dims, strict=True):
                torch.testing.assert_close(a.double(), mine.of(b, d), rtol=1e-5, atol=1e-6, equal_nan=True, msg=what)


def check_statistics(groups):
    for mine, where in each_cut(groups):
        x = torch.randn(5, 3, 11, dtype=torch.float64, requires_grad=True)
        y = torch.randint(11, (5, 3))
        y[1, 1] = -100
        asked = {"entropy": True, "logsumexp": True, "collision": True, "argmax": True, "temperature": 0.7, "dim": -1}
        truth = cece.token_statistics(x, y, **asked)
        mx = mine.of(x, 2)
        ours = cece.distributed.token_statistics(mx, y, **asked, **where)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        assert_on_all(mine.group, *ours)
        total = lambda s: sum((v * torch.arange(1.0, 16).reshape(5, 3)).sum() for v in s[:4])  # noqa: E731
        slope = torch.autograd.grad(total(truth), x)[0]
        torch.testing.assert_close(torch.autograd.grad(total(ours), mx)[0], mine.of(slope, 2), rtol=1e-9, atol=1e-11)


def differentiated(mine, x, dim, f, of_mine):
    """The same function of all classes and of this rank's: derivatives of three orders and forward over reverse."""
    mx = mine.of(x, dim)
    v = torch.randn_like(x)
    value, truth = of_mine(mx), f(x)
    for order in range(3):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-10, msg=f"order {order}")
        (a,), (b,) = (torch.autograd.grad(y, t, create_graph=True) for y, t in ((value, mx), (truth, x)))
        torch.testing.assert_close(a, mine.of(b, dim), rtol=1e-9, atol=1e-10, msg=f"order {order + 1}")
        across = ops.across_ranks((a * mine.of(v, dim)).sum(), len(mine.sizes), mine.group.group_name, True, False)
        value, truth = across, (b * v).sum()
    x, mx, mv = x.detach(), mx.detach(), mine.of(v, dim)
    torch.testing.assert_close(
        torch.func.jvp(of_mine, (mx,), (mv,))[1], torch.func.jvp(f, (x,), (v,))[1], rtol=1e-9, atol=1e-10
    )
    hvp = torch.func.jvp(torch.func.grad(f), (x,), (v,))[1]
    ours = torch.func.jvp(torch.func.grad(of_mine), (mx,), (mv,))[1]
    torch.testing.assert_close(ours, mine.of(hvp, dim), rtol=1e-9, atol=1e-10)


def squared_loss(target, weight, options, mine=None, where=None):
    """A function of logits: of all classes, or of this rank's."""
    if mine is None:
        return lambda x: cece.cross_entropy(x, target, weight, **options).square().sum()
    target = mine.of(target, 1) if target.is_floating_point() else target
    weight = mine.of(weight, 0)
    return lambda x: cece.distributed.cross_entropy(x, target, weight, **options, **where).square().sum()


def squared_statistics(target, mine=None, where=None):
    function, where = (cece.token_statistics, {}) if mine is None else (cece.distributed.token_statistics, where)
    asked = {"entropy": True, "logsumexp": True, "collision": True, "temperature": 0.8}
    return lambda x: sum((v**2).sum() for v in function(x, target, **asked, **where)[:4])


def check_every_order(groups):
    for mine, where in each_cut(groups, few=True):
        x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
        y, w = torch.tensor([0, 10, -100, 5]), torch.rand(11, dtype=torch.float64) + 0.5
        t = torch.randn(4, 11, dtype=torch.float64).softmax(1)
        for target, weight, options in [
            (y, None, {"reduction": "none"}),
            (y, w, {"label_smoothing": 0.1}),
            (t, w, {"label_smoothing": 0.1, "z_loss": 0.3, "softcap": 2.0}),
        ]:
            args = target, weight, options
            differentiated(mine, x, 1, squared_loss(*args), squared_loss(*args, mine, where))
        differentiated(mine, x, 1, squared_statistics(y), squared_statistics(y, mine, where))


def check_infinities_in_every_order(groups):
    """A certain class, and rows that do not count: second derivatives are 0 there, as in one process."""
    for mine, where in each_cut(groups):
        x = torch.randn(4, 11, dtype=torch.float64)
        x[0, 3], x[1], x[2, 5] = INF, -INF, NAN
        x.requires_grad_()
        mx, y = mine.of(x, 1), torch.tensor([3, 2, -100, 10])
        ones = torch.ones_like(x)
        for options in {"skip_masked_rows": True}, {"z_loss": 0.1, "skip_masked_rows": True}:
            g = torch.autograd.grad(
                cece.cross_entropy(x, y, **options, reduction="none")[1:].sum(), x, create_graph=True
            )
            h = torch.autograd.grad(g[0], x, ones)[0]
            loss = cece.distributed.cross_entropy(mx, y, **options, reduction="none", **where)
            g = torch.autograd.grad(loss[1:].sum(), mx, create_graph=True)
            ours = torch.autograd.grad(g[0], mx, mine.of(ones, 1))[0]
            torch.testing.assert_close(ours, mine.of(h, 1), equal_nan=True)  # lse^2 of the certain row is inf
            assert not ours[1:3].any()


def check_linear(groups):
    for mine, where in each_cut(groups, few=True):
        for kind, options in [
            ("labels", {}),
            ("weighted smooth", {"z_loss": 0.1, "token_weight": True, "chunk_size": 3}),
            ("weighted", {"reduction": "none"}),
            ("soft", {"reduction": "sum", "softcap": 4.0}),
        ]:
            options = dict(options)
            x, matrix, bias = (
                torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (11, 5), (11,))
            )
            target, weight, smoothing = of_kind(kind, torch.randn(7, 11))
            if options.pop("token_weight", False):
                options["token_weight"] = torch.rand(7)
            options["label_smoothing"] = smoothing
            truth = cece.linear_cross_entropy(x, matrix, target, linear_bias=bias, weight=weight, **options)
            mx, mm, mb = x.detach().clone().requires_grad_(), mine.of(matrix, 0), mine.of(bias, 0)
            mt = mine.of(target, 1) if kind == "soft" else target
            mw = mine.of(weight, 0)
            loss = cece.distributed.linear_cross_entropy(mx, mm, mt, linear_bias=mb, weight=mw, **options, **where)
            torch.testing.assert_close(loss, truth)
            assert_on_all(mine.group, loss)
            g = torch.randn(truth.shape, dtype=torch.float64)
            a, b = (
                torch.autograd.grad(y, t, g, create_graph=True)
                for y, t in ((loss, (mx, mm, mb)), (truth, (x, matrix, bias)))
            )
            assert_on_all(mine.group, a[0])
            for of_mine, of_all, dim in zip(a, (b[0], mine.of(b[1], 0), mine.of(b[2], 0)), "xmb", strict=True):
                torch.testing.assert_close(of_mine, of_all, msg=dim)
            second = torch.autograd.grad(b[0].square().sum(), (x, matrix))
            ours = torch.autograd.grad(a[0].square().sum(), (mx, mm))
            torch.testing.assert_close(ours[0], second[0])
            torch.testing.assert_close(ours[1], mine.of(second[1], 0))
        asked = {"entropy": True, "argmax": True, "chunk_size": 2}
        y = torch.randint(11, (7,))
        truth = cece.linear_token_statistics(x, matrix, y, **asked)
        ours = cece.distributed.linear_token_statistics(mx, mm, y, **asked, **where)
        torch.testing.assert_close(list(ours)[:2], list(truth)[:2])
        assert torch.equal(ours.argmax, truth.argmax)
        a, b = (torch.autograd.grad((s.entropy * s.log_prob).sum(), t)[0] for s, t in ((ours, mx), (truth, x)))
        torch.testing.assert_close(a, b)


def check_linear_in_bfloat16(groups):
    """Sums are of float32, a shard of nothing adds nothing, and ranks of any sizes cut the rows into as many chunks."""
    for mine, where in each_cut(groups):
        x, matrix = torch.randn(7, 5), torch.randn(11, 5)
        x, matrix = (t.bfloat16().requires_grad_() for t in (x, matrix))
        y = torch.randint(11, (7,))
        truth = torch.autograd.grad(cece.linear_cross_entropy(x, matrix, y), (x, matrix))
        mx, mm = x.detach().clone().requires_grad_(), mine.of(matrix, 0)
        loss = cece.distributed.linear_cross_entropy(mx, mm, y, **where)
        ours = torch.autograd.grad(loss, (mx, mm))
        torch.testing.assert_close(ours, (truth[0], mine.of(truth[1], 0)), rtol=1e-2, atol=1e-4)
    mine = Mine(groups[4], [0, 100_000, 0, 1])
    x, matrix, y = torch.randn(60, 1), torch.randn(mine.all, 1), torch.randint(mine.all, (60,))
    loss = cece.distributed.linear_cross_entropy(x, mine.of(matrix, 0), y, group=mine.group, classes=mine.sizes)
    torch.testing.assert_close(loss, cece.linear_cross_entropy(x, matrix, y))


def check_bytes_on_the_wire(groups):
    """Forward: 16 to 32 bytes a row and rank, in one exchange; backward: none."""
    mine, where = next(each_cut({4: groups[4]}))
    x, y, w = mine.of(torch.randn(100, 11), 1).requires_grad_(), torch.randint(11, (100,)), torch.rand(11)
    calls = {
        16: lambda: cece.distributed.cross_entropy(x, y, **where),
        20: lambda: cece.distributed.cross_entropy(x, y, mine.of(w, 0), **where),
        32: lambda: sum(cece.distributed.token_statistics(x, y, entropy=True, collision=True, **where)[:2]).sum(),
    }
    for expected, call in calls.items():
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            call().backward()
        sent = {
            e.name: e.input_shapes[0] for e in profile.function_events if e.name.startswith("_c10d_functional::all")
        }
        assert list(sent) == ["_c10d_functional::all_gather_into_tensor"]
        assert 4 * math.prod(*sent.values()) == expected * 100


def check_compiled(groups):
    for mine, where in each_cut(groups, few=True):
        x = torch.randn(4, 11, requires_grad=True)
        y, mx = torch.tensor([0, 10, -100, 5]), mine.of(x, 1)
        torch._dynamo.reset()
        call = functools.partial(cece.distributed.cross_entropy, target=y, z_loss=0.1, **where)
        loss = torch.compile(call, fullgraph=True, backend="aot_eager")(mx)
        torch.testing.assert_close(loss, cece.cross_entropy(x, y, z_loss=0.1))
        torch.testing.assert_close(torch.autograd.grad(loss, mx), torch.autograd.grad(call(mx), mx))


def check_batched(groups):
    """vmap: the batch is rows, in one exchange."""
    mine, where = next(each_cut({4: groups[4]}))
    x, y = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    call = functools.partial(cece.distributed.cross_entropy, **where)
    ours = torch.vmap(call)(mine.of(x, 2), y)
    torch.testing.assert_close(ours, torch.stack([cece.cross_entropy(*s) for s in zip(x, y, strict=True)]))
    truth = torch.vmap(torch.func.grad(cece.cross_entropy))(x, y)
    torch.testing.assert_close(torch.vmap(torch.func.grad(call))(mine.of(x, 2), y), mine.of(truth, 2))


def check_errors(groups):
    import torch.distributed as dist

    loss, rank, y = cece.distributed.cross_entropy, dist.get_rank(), torch.tensor([1, 9])
    sizes = [3, 3, 3, 0]
    x = torch.randn(2, sizes[rank])
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds: target\[1\] must be in \[0, 9\)"):
        loss(x, y, classes=9)
    with pytest.raises(IndexError, match="Target 9"):
        loss(x, y)
    with pytest.raises(IndexError, match="Target 9"):
        cece.distributed.linear_cross_entropy(torch.randn(2, 5), torch.randn(sizes[rank], 5), y, classes=9)
    with pytest.raises(ValueError, match="logits must have this rank's classes in dimension 1, .* of 14, got"):
        loss(x, y, classes=14)
    with pytest.raises(ValueError, match="classes must have a number for each of 4 ranks"):
        loss(x, y, classes=[9])
    with pytest.raises(ValueError, match="classes must be the number of all classes, got 0"):
        loss(x, y, classes=0)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None, got str"):
        loss(x, y, group="world")
    with pytest.raises(TypeError, match="classes must be an int, got str"):
        loss(x, y, classes="many")
    with pytest.raises(ValueError, match="at least one class on some rank"):
        loss(x[:, :0], y)
    with pytest.raises(RuntimeError, match="must have a dimension of classes"):
        loss(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(ValueError, match="normalizer is what reduction='mean'"):
        loss(x, y, normalizer=2.0, reduction="sum")
    with pytest.raises(ValueError, match="class indices, without"):
        cece.distributed.token_statistics(x, x)
    other = dist.new_group([0])
    if rank > 0:
        with pytest.raises((ValueError, TypeError), match="of the group|ProcessGroup"):
            loss(x, y, group=other)


def check_dead_rank(groups):
    """The last check: a rank that does not come ends in torch's own error, soon."""
    import datetime

    import torch.distributed as dist

    group = dist.new_group(list(range(RANKS)), timeout=datetime.timedelta(seconds=2))
    if dist.get_rank() == RANKS - 1:
        return
    with pytest.raises(RuntimeError, match="(?i)timed out|timeout|closed"):
        cece.distributed.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), group=group, classes=20)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.outcomes_of(__file__, tmp_path_factory.mktemp("distributed"), RANKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(check, outcomes):
    processes.assert_well(check, outcomes)


if __name__ == "__main__":
    import sys

    processes.run_rank(sys.argv[1], RANKS, CHECKS, begin)
