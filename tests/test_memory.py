"""The memory of a large gradient (csrc/cpu/pages.h) behaves as any tensor's; and threads with small stacks."""

import subprocess
import sys
import threading

import pytest
import torch

import cece

MIB = 2**20


def large_gradient(rows=2048, classes=1024, dtype=torch.float32):
    """One of 4 MiB and more, from the memory that is kept for gradients."""
    x = torch.randn(rows, classes, dtype=dtype).requires_grad_()
    return torch.autograd.grad(cece.cross_entropy(x, torch.zeros(rows, dtype=torch.long)), x)[0]


GRADIENTS = {
    "small": lambda: large_gradient(6, 5),
    "large": large_gradient,
    "large, bfloat16": lambda: large_gradient(dtype=torch.bfloat16),
    "channels last": lambda: torch.autograd.grad(
        cece.cross_entropy(
            x := torch.randn(4, 21, 160, 160).to(memory_format=torch.channels_last).requires_grad_(),
            torch.zeros(4, 160, 160, dtype=torch.long),
        ),
        x,
    )[0],
    "binary": lambda: torch.autograd.grad(
        cece.binary_cross_entropy_with_logits(x := torch.randn(2048, 1024).requires_grad_(), x.detach() > 0), x
    )[0],
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_storage_is_resized_like_any_other(kind):
    """FSDP and others free a tensor's memory with untyped_storage().resize_(0) and bring it back."""
    g = GRADIENTS[kind]()
    kept, size = g.clone(), g.untyped_storage().nbytes()
    assert g.untyped_storage().resizable()
    g.untyped_storage().resize_(0)
    assert g.untyped_storage().nbytes() == 0
    g.untyped_storage().resize_(size)
    g.copy_(kept)
    assert torch.equal(g, kept)
    g.untyped_storage().resize_(3 * size)  # what is there stays
    assert torch.equal(g, kept)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_resize_(kind):
    g = GRADIENTS[kind]()
    first = g.flatten()[:7].clone() if g.is_contiguous() else None
    n = g.numel()
    g.resize_(n + 5_000_000)
    assert g.numel() == n + 5_000_000
    if first is not None:
        assert torch.equal(g[:7], first)
    g.fill_(1)
    g.resize_(3)
    assert g.sum() == 3
    g.resize_(0).resize_(2048, 1024).zero_()
    assert not g.any()


def test_shared_between_processes_and_views():
    """What else tensors do with their storage."""
    g = large_gradient()
    kept = g.clone()
    g.share_memory_()
    assert torch.equal(g, kept)
    view = large_gradient().view(1024, 2048)[3:5]
    assert view.isfinite().all()  # keeps the block alive
    lazy = torch._lazy_clone(large_gradient())
    lazy.zero_()
    assert not lazy.any()


def resident(code):
    """What a process of its own prints, a number."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(n) for n in done.stdout.split()]


PRELUDE = """if True:
    import resource, torch, cece
    def address_space():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() // 2**20
    def step(mib):
        x = torch.zeros(mib, 2**18).requires_grad_()
        return torch.autograd.grad(cece.cross_entropy(x, torch.zeros(mib, dtype=torch.long)), x)[0]
    step(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_empty_cache_gives_the_kept_memory_back():
    kept, released = resident(
        PRELUDE
        + """
    before = address_space()
    step(64); step(96)
    kept = address_space() - before
    cece.empty_cache()
    print(kept, address_space() - before)"""
    )
    assert kept >= 150 and released <= kept - 150


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_kept_memory_is_dropped_when_an_allocation_fails():
    """Two blocks of 128 MiB are kept; a gradient of 200 MiB then fits only without them."""
    (size,) = resident(
        PRELUDE
        + """
    step(128); step(129)
    x = torch.zeros(200, 2**18).requires_grad_()
    loss = cece.cross_entropy(x, torch.zeros(200, dtype=torch.long))
    limit = (address_space() + 120) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(torch.autograd.grad(loss, x)[0].numel() * 4 // 2**20)"""
    )
    assert size == 200


def test_an_allocation_that_cannot_be_is_torchs_error():
    code = (
        PRELUDE
        + """
    x = torch.zeros(200, 2**18).requires_grad_()
    loss = cece.cross_entropy(x, torch.zeros(200, dtype=torch.long))
    limit = (address_space() + 20) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        loss.backward()
    except RuntimeError as e:
        assert "allocate" in str(e), e
        print(1)"""
    )
    assert resident(code) == [1]


def test_the_profiler_sees_as_much_freed_as_allocated():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        large_gradient(2049, 1001)
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events) >= 2049 * 1001 * 4 and sum(events) == 0


# ---- stacks

LOSSES = {
    "few classes": lambda dtype: (torch.randn(3000, 10).to(dtype), torch.randint(10, (3000,))),
    "rows": lambda dtype: (torch.randn(3, 5000).to(dtype), torch.randint(5000, (3,))),
    "a long row": lambda dtype: (torch.randn(1, 140_001).to(dtype), torch.tensor([7])),
    "pixels": lambda dtype: (torch.randn(2, 21, 40, 40).to(dtype), torch.randint(21, (2, 40, 40))),
    "strided": lambda dtype: (torch.randn(3, 2, 5000).to(dtype)[:, 0, ::2], torch.randint(2500, (3,))),
}


def test_threads_with_small_stacks():
    """128 KiB, Python's frames included: in a process of its own, which an overflow would kill; a thread for each."""
    cases = [(case, dtype) for case in LOSSES for dtype in ("float64", "float32", "bfloat16")]
    code = f"""if True:
        import sys, threading, torch, cece
        sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
        from test_memory import LOSSES
        torch.set_num_threads(1)
        def work(number, x, y):
            p = torch.rand(x.shape)
            for target in (y, p):
                for inplace in (False, True):
                    h = x.clone().requires_grad_() * 1
                    cece.cross_entropy(h, target, torch.rand(x.shape[1]), label_smoothing=0.1,
                                       inplace_backward=inplace).backward()
            for loss in (cece.binary_cross_entropy_with_logits, cece.binary_cross_entropy):
                u = x.detach().sigmoid().requires_grad_()
                loss(u, p > 0.5, torch.rand(x.shape[-1:])).backward()
            print(number, flush=True)
        threading.stack_size(128 * 1024)
        for number, (case, dtype) in enumerate({cases!r}):
            thread = threading.Thread(target=work, args=(number, *LOSSES[case](getattr(torch, dtype))))
            thread.start()
            thread.join()"""
    assert resident(code) == list(range(len(cases))), cases


def test_many_threads_at_once():
    """Each has its own place to work in."""
    x, y = torch.randn(64, 21, 300), torch.randint(21, (64, 300))
    expected = torch.autograd.grad(cece.cross_entropy(h := x.clone().requires_grad_(), y), h)[0]
    wrong = []

    def work():
        for _ in range(5):
            h = x.clone().requires_grad_()
            if not torch.equal(torch.autograd.grad(cece.cross_entropy(h, y), h)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
