"""XLA as a contender: the losses as people write them in jax, compiled by jax.jit.

Of several spellings each has the one that jax 0.10 is fastest with on a CPU: loss and gradient at 8192 x 1000 take 8 ms
by logsumexp minus the label's logit and 37 by log_softmax; a third of the time by log1p(exp(-|x|)) that two log_sigmoid
take. 16-bit logits are computed in float32, as by everyone here; the gradient comes back in their dtype. Labels become
int32, jax's own integer.
"""

import jax
import jax.numpy as jnp
import torch
from jax.nn import log_softmax, logsumexp, sigmoid, softmax

from .harness import Step

# ---- losses: (logits, target, axis, **options). Where the target is of logits, so is the name.


def cross_entropy(x, y, axis, weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    lse = logsumexp(x, axis=axis)
    if y.ndim == x.ndim:
        return (lse * y.sum(axis) - (x * y).sum(axis)).mean()
    loss = lse - jnp.take_along_axis(x, jnp.expand_dims(y, axis), axis).squeeze(axis)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - x.mean(axis))
    if weight is not None:
        return (loss * weight[y]).sum() / weight[y].sum()
    return loss.mean() + (z_loss * (lse * lse).mean() if z_loss else 0)


def elementwise(x, y, pos_weight=None, label_smoothing=0.0):
    if label_smoothing:
        y = y * (1 - label_smoothing) + label_smoothing / 2
    rest = jnp.log1p(jnp.exp(-abs(x)))
    if pos_weight is None:
        return jnp.maximum(x, 0) - x * y + rest
    return (1 - y) * x + (1 + (pos_weight - 1) * y) * (rest + jnp.maximum(-x, 0))


def binary_cross_entropy_with_logits(x, y, axis, mask=None, **options):
    loss = elementwise(x, y, **options)
    return loss.mean() if mask is None else jnp.where(mask, loss, 0).sum() / mask.sum()


def binary_cross_entropy(p, y, axis):
    return -(y * jnp.maximum(jnp.log(p), -100) + (1 - y) * jnp.maximum(jnp.log1p(-p), -100)).mean()


def sigmoid_focal_loss(x, y, axis, alpha=0.25, gamma=2.0, reduction="mean"):
    p = sigmoid(x)
    missed = 1 - (p * y + (1 - p) * (1 - y))
    return ((alpha * y + (1 - alpha) * (1 - y)) * elementwise(x, y) * missed**gamma).mean()


def asymmetric_loss(x, y, axis, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    p = sigmoid(x)
    rest = jnp.minimum(1 - p + clip, 1)
    loss = y * jnp.log(jnp.maximum(p, 1e-8)) + (1 - y) * jnp.log(jnp.maximum(rest, 1e-8))
    missed = 1 - (p * y + rest * (1 - y))
    return -(loss * missed ** (gamma_pos * y + gamma_neg * (1 - y))).sum()


def multilabel_cross_entropy(x, labels, axis):
    rows = jnp.arange(len(x))[:, None]
    return elementwise(x, jnp.zeros_like(x).at[rows, labels].set(1)).mean()


def kl_divergence(x, other, axis):
    log_p, log_q = log_softmax(x, axis), log_softmax(other, axis)
    return (jnp.exp(log_q) * (log_q - log_p)).sum(axis).mean()


def js_divergence(x, other, axis):
    log_p, log_q = log_softmax(x, axis), log_softmax(other, axis)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.log((p + q) / 2)
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(axis).mean() / 2


def policy(x, y, axis):
    # log_prob + entropy = (x_y - lse) + (lse - sum p x)
    return (jnp.take_along_axis(x, y[:, None], axis).squeeze(axis) - (softmax(x, axis) * x).sum(axis)).mean()


LOSSES = {
    loss.__name__: loss
    for loss in (
        cross_entropy,
        binary_cross_entropy_with_logits,
        binary_cross_entropy,
        sigmoid_focal_loss,
        asymmetric_loss,
        multilabel_cross_entropy,
        kl_divergence,
        js_divergence,
        policy,
    )
}


# ---- contenders


def array(tensor):
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)
    return jnp.asarray(tensor.int().numpy() if tensor.dtype == torch.int64 else tensor.numpy())


def wide(x):
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


class Xla(Step):
    """Loss and gradient, one program."""

    passes = ("both",)
    pool = "XLA"
    compiled = staticmethod(jax.value_and_grad)

    def __init__(self, case, logits, target, options):
        # jax knows no strides: of channels_last logits the classes are the last dimension
        axis = 1 if logits.is_contiguous() else -1
        self.source = array(logits.contiguous() if axis == 1 else logits.movedim(1, -1))
        arrays = {k: array(v) for k, v in options.items() if isinstance(v, torch.Tensor)}
        numbers = {k: v for k, v in options.items() if k not in arrays}
        loss = LOSSES[name_of(case)]

        def of_logits(x, y, arrays):
            options = {k: wide(v) for k, v in arrays.items()}
            return loss(wide(x), wide(y), axis, **options, **numbers)

        self.inputs = array(target), arrays
        self.call, self.write = jax.jit(self.compiled(of_logits)), jax.jit(jnp.copy)

    def prepare(self):
        self.logits = jax.block_until_ready(self.write(self.source))

    def forward(self):
        self.result = jax.block_until_ready(self.call(self.logits, *self.inputs))

    def backward(self, loss):
        self.result = None  # the gradient's release


class XlaForward(Xla):
    passes = ("forward",)
    compiled = staticmethod(lambda loss: loss)


def name_of(case):
    return case.loss if isinstance(case.loss, str) else case.loss.__name__


def kinds(case):
    return {"XLA": Xla, "XLA forward": XlaForward} if name_of(case) in LOSSES else {}
