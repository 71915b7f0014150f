"""Distillation and compression losses.

The order of a KL is in its name; what Model-Optimizer calls "forward KL" is `kl_student_teacher`.

`distill_sum` works from hidden states in chunks of tokens, so neither pass holds a [B, T, V] array. The forward pass
has the softmaxes at hand and already forms the gradient of each chunk; the backward pass only scales it.

Under a mesh, every device loops over its own parts of rows. Devices along the model axis share the vocabulary: for
each chunk they exchange its hidden states and the gradient of these. The output embedding is gathered over the other
axes once.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from dms_jax.axes import EXACT, Array, typed
from dms_jax.sharding import constrain, fold_length, num_shards, unfold_length

CHUNK = 256  # tokens of a row, or of each device's part of a row, whose logits exist at a time


def _logsumexp(logits: Array) -> Array:
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


class _Softmax(NamedTuple):
    """Unnormalized softmax: exp(logits - max), its sum over the last axis, and the log-sum-exp of the logits."""

    weight: Array
    total: Array
    logsumexp: Array


def _softmax(logits: Array) -> _Softmax:
    top = logits.max(axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1, keepdims=True)
    return _Softmax(weight, total, top + jnp.log(total))


def _dot(a: Array, b: Array) -> Array:
    """Return sum(a * b) over the last axis, which is kept. As an einsum, XLA on a CPU computes it five times faster."""
    return jnp.einsum("...v,...v->...", a, b, precision=EXACT)[..., None]


def _kl(p: Array, q: Array) -> Array:
    """Return KL(p || q) over the last axis, in nats, from fp32 logits.

    Log-probabilities are never formed: they are as large as the logits, and writing them out costs three times the
    arithmetic.
    """
    soft = _softmax(p)
    return (_dot(soft.weight, p - q) / soft.total - soft.logsumexp + _logsumexp(q))[..., 0]


def _mean(values: Array, mask: Array) -> Array:
    mask = jnp.asarray(mask, bool)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


@typed
def kl_student_teacher(
    student_logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T V"], mask: Shaped[Array, "B T"]
) -> Float[Array, ""]:
    """Return KL(student || teacher), the reference's loss, in nats per unmasked token; 0 if all are masked."""
    return _mean(_kl(student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)), mask)


@typed
def kl_teacher_student(
    student_logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T V"], mask: Shaped[Array, "B T"]
) -> Float[Array, ""]:
    """Return KL(teacher || student) in nats per unmasked token; 0 if all are masked."""
    return _mean(_kl(teacher_logits.astype(jnp.float32), student_logits.astype(jnp.float32)), mask)


@typed
def compression_loss(
    evict: Float[Array, "L B K T"],
    target_fraction: float | Float[Array, ""],
    *,
    scope: str = "global",
    counted: Shaped[Array, "*#B T"] | None = None,
) -> Float[Array, ""]:
    """Return max(0, target - mean evict), averaged over examples. Evicting more than the target costs nothing.

    Args:
      evict: each token's decision, 0 or 1.
      target_fraction: the fraction of decisions that should evict.
      scope: "global" takes the mean over layers, heads and tokens of an example, as in the reference. With "layer" or
        "head", each layer or head must reach the target by itself.
      counted: the tokens that enter the mean; None counts all. Leave out padding and tokens that are not `decidable`.
    """
    weight = (
        jnp.ones((1, evict.shape[-1]), evict.dtype) if counted is None else jnp.atleast_2d(counted).astype(evict.dtype)
    )
    per_head = (
        jnp.sum(evict * weight[None, :, None], axis=-1) / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)[None, :, None]
    )  # [L B K]
    axes = {"global": (0, 2), "layer": (2,), "head": ()}[scope]
    return jnp.mean(jnp.maximum(0.0, target_fraction - jnp.mean(per_head, axis=axes)))


def _in_chunks(x: Array, chunk: int) -> Array:
    """Cut [B T ...] into [T/chunk, B, chunk, ...], padded with zeros."""
    b, t = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)


def _from_chunks(x: Array, length: int) -> Array:
    """Undo `_in_chunks` for rows of `length` tokens."""
    n, b, chunk = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, n * chunk, *x.shape[3:])[:, :length]


def _gathered(embedding: Array) -> Array:
    """All-gather D of an output embedding [V D] before the loop over chunks; V stays sharded over the model axis."""
    return constrain(embedding, "vocab", None)


def _logits(hidden: Array, embedding: Array) -> Array:
    """Return the fp32 logits [rows chunk V] of one chunk of hidden states [rows chunk D]."""
    logits = jnp.einsum(
        "bcd,vd->bcv", constrain(hidden, "rows", None, None), embedding, preferred_element_type=jnp.float32
    )
    return constrain(logits, "rows", None, "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def distill_sum(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    student_embedding: Float[Array, "V D"],
    teacher_embedding: Float[Array, "V D"],
    weight: Float[Array, "B T"],
    order: str = "student_teacher",
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """Return the sum over tokens of weight * KL, in nats, from final-normed hidden states and output embeddings.

    `order` is "student_teacher" for KL(student || teacher), or "teacher_student". `chunk` is the number of tokens of
    each row whose logits exist at a time. Gradients reach the student's hidden states and embedding only.
    """
    return _distill(student, teacher, student_embedding, teacher_embedding, weight, order, chunk, False, False)[0]


def _distill(student, teacher, student_embedding, teacher_embedding, weight, order, chunk, grad_hidden, grad_embedding):
    """Return `distill_sum` and its gradients for `student` and `student_embedding`, each None unless asked for."""
    # Each device's part of a row becomes a separate row, and the embeddings are gathered once.
    rows = len(student)
    student, teacher, weight = (fold_length(x) for x in (student, teacher, weight))
    student_embedding, teacher_embedding = _gathered(student_embedding), _gathered(teacher_embedding)
    chunk = min(chunk, student.shape[1])
    # Each device sums its own part of the embedding's gradient; the parts are added once, after the loop.
    parts = math.gcd(num_shards("rows"), len(student))

    def one_chunk(carry, inputs):
        total, d_embedding = carry
        hidden, teacher_hidden, w = inputs
        s, t = _logits(hidden, student_embedding), _logits(teacher_hidden, teacher_embedding)
        kl = _kl(s, t) if order == "student_teacher" else _kl(t, s)
        d_hidden = None
        if grad_hidden or grad_embedding:
            soft = _softmax(s)
            if order == "student_teacher":
                d_logits = soft.weight * (s - t - _dot(soft.weight, s - t) / soft.total) / soft.total
            else:
                soft_t = _softmax(t)
                d_logits = soft.weight / soft.total - soft_t.weight / soft_t.total
            d_logits = constrain((d_logits * w[..., None]).astype(hidden.dtype), "rows", None, "vocab")
            d_hidden = jnp.einsum("bcv,vd->bcd", d_logits, student_embedding, preferred_element_type=jnp.float32)
            d_hidden = constrain(d_hidden, "row_parts", None, None)
            if grad_embedding:
                split = lambda x: x.reshape(parts, -1, *x.shape[1:])
                part = jnp.einsum(
                    "pbcv,pbcd->pvd",
                    split(d_logits),
                    split(constrain(hidden, "rows", None, None)),
                    preferred_element_type=jnp.float32,
                )
                d_embedding += constrain(part, "rows", "vocab", None)
        return (total + jnp.sum(kl * w), d_embedding), d_hidden

    zero = None
    if grad_embedding:
        zero = constrain(jnp.zeros((parts, *student_embedding.shape), jnp.float32), "rows", "vocab", None)
    chunks = tuple(_in_chunks(x, chunk) for x in (student, teacher, weight))
    (total, d_embedding), d_hidden = jax.lax.scan(one_chunk, (jnp.zeros((), jnp.float32), zero), chunks)
    if d_embedding is not None:
        d_embedding = constrain(d_embedding.sum(0), "vocab", "embed")
    if d_hidden is not None:
        d_hidden = unfold_length(_from_chunks(d_hidden, student.shape[1]), rows)
    return total, d_hidden, d_embedding


def _distill_fwd(student, teacher, student_embedding, teacher_embedding, weight, order, chunk):
    grad_embedding = student_embedding.perturbed
    grad_hidden = student.perturbed or grad_embedding
    student, teacher, student_embedding, teacher_embedding, weight = (
        x.value for x in (student, teacher, student_embedding, teacher_embedding, weight)
    )
    total, d_hidden, d_embedding = _distill(
        student, teacher, student_embedding, teacher_embedding, weight, order, chunk, grad_hidden, grad_embedding
    )
    # Residuals of a custom_vjp are arrays, so empty ones carry the dtypes to the backward pass.
    like = tuple(jnp.zeros((), x.dtype) for x in (student, student_embedding))
    return total, (d_hidden, d_embedding, like)


def _distill_bwd(order, chunk, saved, cotangent):
    d_hidden, d_embedding, like = saved
    scaled = [
        None if g is None else (g * cotangent).astype(x.dtype)
        for g, x in zip((d_hidden, d_embedding), like, strict=True)
    ]
    return scaled[0], None, scaled[1], None, None


distill_sum.defvjp(_distill_fwd, _distill_bwd, symbolic_zeros=True)


@typed
def score_gradient(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    key: Array,
    examples: Int[Array, "B"],
    temperature: Float[Array, "B T"],
    chunk: int = CHUNK,
) -> Float[Array, "B T D"]:
    """Return a random direction for each token's hidden state whose covariance is the Fisher information of its logits.

    For a small change of the hidden states, the mean square of its product with this direction is twice the KL that
    the change causes, summed over the tokens. With q = softmax(logits / temperature), the direction is
    `embedding.T @ (sqrt(q) r - q (sqrt(q) @ r))`, where the signs r are drawn for each token and vocabulary entry.
    Drawing a next token instead would give the same covariance with a much larger variance of the square. A temperature
    above 1 also counts changes of tokens that are all but certain, whose information at temperature 1 is about 0
    although a large change would cost as many nats as elsewhere.

    The signs are a function of (key, example, position) alone, so they are the same on any mesh. `hidden` is
    final-normed; `chunk` is as in `distill_sum`.
    """
    rows, length = hidden.shape[:2]
    parts = len(fold_length(hidden)) // rows
    keys = jax.vmap(lambda example: jax.random.fold_in(key, example))(examples)
    positions = fold_length(jnp.broadcast_to(jnp.arange(length), (rows, length)))
    folded, temperature, embedding = fold_length(hidden), fold_length(temperature), _gathered(embedding)
    chunk = min(chunk, folded.shape[1])
    words = lambda key, at: jax.random.bits(jax.random.fold_in(key, at), (-(-len(embedding) // 32),), jnp.uint32)
    words_of = jax.vmap(jax.vmap(words, (None, 0)))

    def one_chunk(inputs):
        part, position, temperature = inputs
        soft = _softmax(_logits(part, embedding) / jnp.maximum(temperature, 1e-6)[..., None])  # 0 is padding of a chunk
        q = soft.weight / soft.total
        drawn = _with_signs(jnp.sqrt(q), words_of(jnp.repeat(keys, parts), position))
        direction = drawn - q * drawn.sum(-1, keepdims=True)
        return jnp.einsum("bcv,vd->bcd", direction.astype(embedding.dtype), embedding).astype(hidden.dtype)

    out = jax.lax.map(one_chunk, tuple(_in_chunks(x, chunk) for x in (folded, positions, temperature)))
    return unfold_length(_from_chunks(out, folded.shape[1]), rows)


def _with_signs(values: Float[Array, "*A V"], words: Shaped[Array, "*A words"]) -> Float[Array, "*A V"]:
    """Give the values >= 0 random signs, each by one bit of the random `words`: V / 32 of them, rounded up."""
    shift = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = words[..., None] << shift  # each bit in turn is at the place of the sign
    sign = bits.reshape(*words.shape[:-1], -1)[..., : values.shape[-1]] & jnp.uint32(1 << 31)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(values, jnp.uint32) ^ sign, jnp.float32)


class TokenMetrics(NamedTuple):
    """Metrics of each token [B T]: KLs and negative log-likelihoods in nats, and whether the argmax tokens agree."""

    kl_teacher_student: Array
    kl_student_teacher: Array
    student_nll: Array
    teacher_nll: Array
    agree: Array


@typed
def token_metrics(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    student_embedding: Float[Array, "V D"],
    teacher_embedding: Float[Array, "V D"],
    next_tokens: Int[Array, "B T"],
    chunk: int = CHUNK,
) -> TokenMetrics:
    """Compare student and teacher at every token, in chunks of `chunk` tokens; hidden states are final-normed."""
    rows = len(student)
    student, teacher, next_tokens = (fold_length(x) for x in (student, teacher, next_tokens))
    student_embedding, teacher_embedding = _gathered(student_embedding), _gathered(teacher_embedding)
    chunk = min(chunk, student.shape[1])

    def one_chunk(inputs):
        hidden, teacher_hidden, target = inputs
        s, t = _logits(hidden, student_embedding), _logits(teacher_hidden, teacher_embedding)
        # A masked sum, because looking up one entry would gather the logits of all devices that share the vocabulary.
        at_target = jax.lax.broadcast_to_rank(jnp.arange(s.shape[-1]), s.ndim) == target[..., None]
        student_nll, teacher_nll = (_logsumexp(x)[..., 0] - jnp.sum(jnp.where(at_target, x, 0.0), -1) for x in (s, t))
        return TokenMetrics(_kl(t, s), _kl(s, t), student_nll, teacher_nll, s.argmax(-1) == t.argmax(-1))

    chunks = tuple(_in_chunks(x, chunk) for x in (student, teacher, next_tokens))
    return TokenMetrics(
        *(unfold_length(_from_chunks(x, student.shape[1]), rows) for x in jax.lax.map(one_chunk, chunks))
    )
