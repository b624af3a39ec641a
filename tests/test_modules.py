"""The modules: torch.nn's in all but the kernel."""

import copy
import io
import pickle

import pytest
import torch

import cece

PAIRS = {
    "CrossEntropyLoss": {"weight": torch.rand(5), "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1},
    "BCEWithLogitsLoss": {"weight": torch.rand(5), "reduction": "sum", "pos_weight": torch.rand(5)},
    "BCELoss": {"weight": torch.rand(5), "reduction": "none"},
}


def both(name, **options):
    return getattr(cece, name)(**options), getattr(torch.nn, name)(**options)


def inputs(name):
    x = torch.rand(6, 5)
    return x, torch.randint(5, (6,)) if name == "CrossEntropyLoss" else torch.rand(6, 5)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("name", PAIRS)
def test_same_as_torchs(name, options):
    ours, theirs = both(name, **(PAIRS[name] if options == "all" else {}))
    assert isinstance(ours, type(theirs))
    args = inputs(name)
    torch.testing.assert_close(ours(*args), theirs(*args))


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_interchange(name):
    """Both ways, strictly; with the keys torch has."""
    ours, theirs = both(name, **PAIRS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict()) and "weight" in ours.state_dict()
    for a, b in ((ours, theirs), (theirs, ours)):
        for buffer in a.buffers():
            buffer.copy_(torch.rand_like(buffer))
        b.load_state_dict(a.state_dict(), strict=True)
        args = inputs(name)
        torch.testing.assert_close(a(*args), b(*args))
    plain, torchs = both(name)
    assert not plain.state_dict() and not torchs.state_dict()


@pytest.mark.parametrize("name", PAIRS)
def test_deepcopy_pickle_and_save(name):
    loss, args = getattr(cece, name)(**PAIRS[name]), inputs(name)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    copies = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(file, weights_only=False)
    for other in copies:
        assert type(other) is type(loss)
        assert torch.equal(other(*args), loss(*args))
        assert other.weight.data_ptr() != loss.weight.data_ptr()
    assert pickle.loads(pickle.dumps(cece.CrossEntropyLoss(inplace_backward=True))).inplace_backward


@pytest.mark.parametrize("name", PAIRS)
def test_to_moves_and_casts_the_buffers(name):
    loss, args = getattr(cece, name)(**PAIRS[name]).double(), inputs(name)
    assert loss.weight.dtype == torch.float64
    torch.testing.assert_close(loss(*args).float(), getattr(cece, name)(**PAIRS[name])(*args))
    assert loss.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("name", PAIRS)
def test_an_unknown_reduction_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"cece.{name}: reduction must be 'none', 'mean' or 'sum', got 'average'"):
        getattr(cece, name)(reduction="average")


OWN = "z_loss=0.0, logit_scale=1.0, softcap=None, skip_masked_rows=False"
MORE = "label_smoothing=0.0, ignore_index=None, mean_dim=None, poly=0.0"
REPRS = {
    "CrossEntropyLoss": (
        "weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.0, inplace_backward=False, " + OWN,
        "weight=(5,), ignore_index=2, reduction='sum', label_smoothing=0.1, inplace_backward=False, " + OWN,
    ),
    "BCEWithLogitsLoss": (
        "weight=None, pos_weight=None, reduction='mean', " + MORE,
        "weight=(5,), pos_weight=(5,), reduction='sum', " + MORE,
    ),
    "BCELoss": ("weight=None, reduction='mean'", "weight=(5,), reduction='none'"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_repr_shows_every_option(name):
    plain, full = REPRS[name]
    assert repr(getattr(cece, name)()) == f"{name}({plain})"
    assert repr(getattr(cece, name)(**PAIRS[name])) == f"{name}({full})"
    assert "inplace_backward=True" in repr(cece.CrossEntropyLoss(inplace_backward=True))


@pytest.mark.parametrize("name", PAIRS)
def test_where_torchs_init_made_it(name):
    """A subclass that calls torch.nn's __init__ by name, and a torch module (pickled, say) whose class is made ours."""
    ours, torchs, args = getattr(cece, name), getattr(torch.nn, name), inputs(name)

    class Mine(ours):
        def __init__(self):
            torchs.__init__(self, **PAIRS[name])

    converted = pickle.loads(pickle.dumps(torchs(**PAIRS[name])))
    converted.__class__ = ours
    for loss in (Mine(), converted):
        assert torch.equal(loss(*args), ours(**PAIRS[name])(*args))
        assert repr(loss)
        assert torch.equal(torch.jit.script(loss)(*args), loss(*args))


def test_inplace_backward():
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    h = x * 1
    (g,) = torch.autograd.grad(cece.CrossEntropyLoss(inplace_backward=True)(h, y), h)
    assert g.data_ptr() == h.data_ptr()
    torch.testing.assert_close(g, torch.autograd.grad(torch.nn.CrossEntropyLoss()(x, y), x)[0])


@pytest.mark.parametrize("name", PAIRS)
def test_a_subclass_may_change_the_options_later(name):
    """Modules read their attributes at each call, as torch's do."""
    ours, theirs = both(name)
    ours.reduction = theirs.reduction = "sum"
    args = inputs(name)
    torch.testing.assert_close(ours(*args), theirs(*args))


def test_training_a_model_gives_torchs_curve():
    """Ten steps of a small classifier, the same numbers to float32's last bits."""

    def train(loss):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
        x, y = torch.randn(64, 20), torch.randint(10, (64,))
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    ours, theirs = (
        train(cece.CrossEntropyLoss(label_smoothing=0.1)),
        train(torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
    )
    assert ours == pytest.approx(theirs, rel=1e-5) and ours[-1] < ours[0]
