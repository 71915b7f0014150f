"""Models with kernels, in interpret mode: training, chunked prefill and decoding give the results of the XLA path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.kernels import attention_api
from dms_jax.kernels.block_sizes import PlaceBlocks, SlotBlocks, TrainBlocks
from dms_jax.kernels.dispatch import GPU, TPU, is_available
from dms_jax.models import attention_layer

BLOCKS = {
    TPU: {
        "train_attention": TrainBlocks(16, 8),
        "decode_attention": SlotBlocks(8, 8),
        "chunk_attention": SlotBlocks(8, 8),
        "page_attention": SlotBlocks(8, 8),
        "compaction": PlaceBlocks(4, 8),
    },
    GPU: {
        "decode_attention": SlotBlocks(64, 64, 1, 2),
        "chunk_attention": SlotBlocks(64, 64, 1, 2),
        "compaction": PlaceBlocks(32),
    },
}
NO_BLOCKS = SlotBlocks(0, 0)  # ignored by a kernel without block sizes


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels of an implementation on the CPU, and return the set that records which of them have run."""
    ran = set()

    def use(implementation):
        def interpret(name, kernel_of):
            original = getattr(attention_api, name)

            def call(*args, **kwargs):
                kernel = kernel_of(*args)
                ran.add(kernel)
                return original(*args, **kwargs, interpret=True, blocks=BLOCKS[implementation].get(kernel, NO_BLOCKS))

            for module in (attention_api, attention_layer):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, call)

        interpret("gated_attention", lambda *_: "train_attention")
        interpret("attend_to_slots", lambda q, *_: "decode_attention" if q.shape[1] == 1 else "chunk_attention")
        interpret("attend_to_pages", lambda *_: "page_attention")
        interpret("attend_to_pairs", lambda *_: "chunk_attention")
        interpret("write_pairs", lambda *_: "compaction")
        interpret("decode_update", lambda *_: "decode_update")
        monkeypatch.setattr(attention_layer, "is_available", functools.partial(is_available, interpret=True))
        return ran

    return use


DMS = DMSConfig(window_size=3, evict_logit_bias=0.0)


def cached(model, ids, capacity=16):
    """Return logits and cache after a ragged prompt in two chunks and three more tokens."""
    cache = dms_jax.init_cache(model, len(ids), capacity)
    lengths = np.array([len(ids[0]) - 3, 7])[: len(ids)]
    first, cache = dms_jax.prefill(model, cache, ids[:, :-3], lengths, chunk_size=16)
    outputs = [first]
    for step in range(3):
        logits, cache = dms_jax.decode_step(model, cache, ids[:, len(ids[0]) - 3 + step])
        outputs.append(logits[:, None])
    return jnp.concatenate(outputs, 1), cache


@pytest.mark.parametrize(("implementation", "dms"), [(TPU, DMS), (GPU, DMS), (GPU, None)])
def test_prefill_and_decode_equal_the_xla_path(rng, interpreted, implementation, dms):
    fields = {"num_layers": 1, "num_kv_heads": 2, "num_q_heads": 4}
    rows, length = (2, 24) if implementation == TPU else (1, 20)
    ids = tokens(rng, rows, length)
    capacity = 12 if dms else 64  # 12 slots are too few for a head that keeps all pairs, so some are forced out
    wanted, cache = cached(tiny_model(dms, 3, **fields), ids, capacity)
    ran = interpreted(implementation)
    actual, other = cached(tiny_model(dms, 3, implementation=implementation, **fields), ids, capacity)
    assert ran == {"chunk_attention", "compaction", "decode_update", "decode_attention"}
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    for name in ("position", "expiry", "forced_evictions"):
        np.testing.assert_array_equal(getattr(other.layers[0], name), getattr(cache.layers[0], name))
    np.testing.assert_array_equal(other.live_counts, cache.live_counts)
    if dms:
        assert dms_jax.compression_ratio(cache) > 1.2


def in_pages(model, ids, policy=None):
    """Return logits and cache after a prompt in two chunks and three more tokens, in pages of four pairs."""
    cache = dms_jax.init_pages(model, len(ids), len(ids[0]), num_pages=200, page_size=4, policy=policy)
    first, cache = dms_jax.prefill(model, cache, ids[:, :-3], chunk_size=16)
    outputs = [first]
    for step in range(3):
        logits, cache = dms_jax.decode_step(model, cache, ids[:, len(ids[0]) - 3 + step])
        outputs.append(logits[:, None])
    return jnp.concatenate(outputs, 1), cache


# The ring of five pairs takes a page and a part of another one.
PAGED = {"num_layers": 2, "num_kv_heads": 2, "num_q_heads": 4}
PAGED_DMS = DMSConfig(window_size=4, evict_logit_bias=0.0)


def test_pages_equal_the_mask_path(rng, interpreted):
    ids = tokens(rng, 2, 26)
    wanted, _ = tiny_model(PAGED_DMS, 3, **PAGED).hard(ids)
    ran = interpreted(TPU)
    actual, cache = in_pages(tiny_model(PAGED_DMS, 3, implementation=TPU, **PAGED), ids)
    assert ran == {"chunk_attention", "page_attention"}
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    survivors = np.asarray(cache.heads.survivors)
    assert dms_jax.compression_ratio(cache) > 1.2 and survivors.max() > survivors.min() + 4


def test_pages_under_budgets_equal_the_xla_path(rng, interpreted):
    ids = tokens(rng, 2, 26)
    wanted, other = in_pages(tiny_model(PAGED_DMS, 3, **PAGED), ids, "dms_budget:9")
    ran = interpreted(TPU)
    actual, cache = in_pages(tiny_model(PAGED_DMS, 3, implementation=TPU, **PAGED), ids, "dms_budget:9")
    assert ran == {"chunk_attention", "page_attention"}
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.live_counts, other.live_counts)


def test_training_equals_the_xla_path(rng, interpreted):
    ids, noise = tokens(rng, 2, 29), jax.random.logistic(jax.random.key(0), (2, 2, 2, 29))
    fields = {"num_layers": 2, "num_kv_heads": 2, "num_q_heads": 4}

    def value_and_gradient(model):
        from dms_jax.models.parameters import ModelStructure, flatten

        template = ModelStructure(model)

        def loss(params):
            logits, evict = template.build(params).relaxed(ids, noise)
            return jnp.mean(jnp.sin(logits)) + jnp.mean(evict)

        return jax.value_and_grad(loss)(flatten(model))

    wanted = value_and_gradient(
        tiny_model(DMSConfig(window_size=3, tau=2.0, evict_logit_scale=3.0, evict_logit_bias=0.0), 3, **fields)
    )
    ran = interpreted(TPU)
    model = tiny_model(
        DMSConfig(window_size=3, tau=2.0, evict_logit_scale=3.0, evict_logit_bias=0.0), 3, implementation=TPU, **fields
    )
    actual = value_and_gradient(model)
    assert ran == {"train_attention"}
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(float(jnp.abs(theirs).max()), 1e-3))
