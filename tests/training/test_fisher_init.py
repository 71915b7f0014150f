"""The closed-form start of the evict head, against the definition of the Fisher information and NumPy regressions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model, tokens

from dms_jax.config import DMSConfig
from dms_jax.core.losses import score_gradient
from dms_jax.models.layers import unit_rms
from dms_jax.sharding import make_mesh
from dms_jax.training import fisher_init
from dms_jax.training.fisher_init import LabelSums, add_labels, fit, gate_information, no_labels

WINDOW = 6


@functools.cache
def model_of(shift: int = 0, granularity: str = "head"):
    return tiny_model(DMSConfig(window_size=WINDOW, decision_shift=shift, granularity=granularity), num_layers=2)


@functools.cache
def adding(model):
    """`add_labels` for a model, compiled once for each shape of rows."""
    return jax.jit(lambda sums, *batch: add_labels(sums, model, *batch, 0))


@functools.cache
def information_of(model):
    """`gate_information` of a model, compiled once for each shape of rows: (rows, segments, examples, seed)."""
    return jax.jit(lambda *batch: gate_information(model, *batch))


def labels_of(model, rows, segments=None, examples=None, sums=None) -> LabelSums:
    segments = np.zeros(rows.shape, np.int32) if segments is None else segments
    examples = np.arange(len(rows), dtype=np.int32) if examples is None else examples
    return adding(model)(no_labels(model.config) if sums is None else sums, rows, segments, examples)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_score_gradient_has_the_covariance_of_the_fisher_information(rng, temperature):
    """Its mean is 0 and its covariance is E^T (diag(q) - q q^T) E. 45 is no multiple of the 32 signs of a word."""
    embedding, hidden = rng.normal(size=(45, 5)).astype(np.float32), rng.normal(size=(1, 1, 5)).astype(np.float32)
    draws = 20_000
    drawn = jax.vmap(
        lambda example: score_gradient(hidden, embedding, jax.random.key(3), example[None], np.float32([[temperature]]))
    )
    found = np.asarray(jax.jit(drawn)(jnp.arange(draws)))[:, 0, 0]
    q = np.exp(hidden[0, 0] @ embedding.T / temperature)
    q /= q.sum()
    wanted = embedding.T @ (np.diag(q) - np.outer(q, q)) @ embedding
    scale = np.sqrt(np.diag(wanted))
    assert np.abs(found.mean(0) / scale).max() < 5 / np.sqrt(draws)  # five standard errors
    covariance = found.T @ found / draws
    assert np.abs((covariance - wanted) / np.outer(scale, scale)).max() < 5 * np.sqrt(2 / draws)


def test_score_gradient_depends_on_example_and_position_alone(rng):
    """Rows in any order, and chunks of any size, get the same signs."""
    embedding = rng.normal(size=(40, 4)).astype(np.float32)
    hidden = rng.normal(size=(3, 10, 4)).astype(np.float32)
    of = lambda rows, examples, **options: np.asarray(
        score_gradient(
            rows, embedding, jax.random.key(0), np.int32(examples), np.ones(rows.shape[:2], np.float32), **options
        )
    )
    whole = of(hidden, [4, 5, 6])
    np.testing.assert_allclose(of(hidden[::-1], [6, 5, 4], chunk=3)[::-1], whole, rtol=1e-5, atol=1e-6)
    assert np.abs(of(hidden, [4, 5, 7]) - whole).max(axis=(1, 2))[2] > 0.1
    same = np.repeat(hidden[:1, :1], 10, axis=1)
    assert np.abs(np.diff(of(same, [4]), axis=1)).max() > 0.1  # positions differ


def test_information_of_gates_is_the_diagonal_of_the_fisher_matrix(rng, monkeypatch):
    """Against the Jacobian of the logits: J^T (diag(p) - p p^T) J, summed over the tokens of a row."""
    model, rows = model_of(), tokens(rng, 1, 24)
    shape = (model.config.num_layers, 1, model.config.num_kv_heads, 24)
    logits = lambda gates: model.logits(model.gated_hidden(rows, gates, None, "none")[0])[0]
    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(jnp.zeros(shape)))  # [T V L B K T]
    p = np.asarray(jax.nn.softmax(jax.jit(logits)(jnp.zeros(shape)), axis=-1))
    mean = np.einsum("tv,tv...->t...", p, jacobian)
    wanted = np.einsum("tv,tv...->...", p, jacobian**2) - (mean**2).sum(0)
    draws = 400
    monkeypatch.setattr(fisher_init, "TEMPERATURES", (1.0, 1.0))
    information = jax.jit(lambda seed: gate_information(model, rows, None, jnp.zeros(1, jnp.int32), seed)[0])
    found = np.mean([np.asarray(information(seed)) for seed in range(draws)], axis=0)
    can_leave = np.arange(24) < 24 - 1 - WINDOW
    assert (found[..., ~can_leave] == 0).all() and (wanted[..., can_leave] > 0).all()
    ratio = (found / np.where(can_leave, wanted, 1))[..., can_leave]
    # The square of a sum of signs has a variance of at most 2 mean^2.
    assert abs(ratio.mean() - 1) < 0.03 and np.abs(ratio - 1).max() < 5 * np.sqrt(2 / draws)


def test_queries_and_weights_of_packed_documents(rng):
    """Counts by brute force over a row of documents and padding."""
    segments = np.repeat([1, 2, 3, -1], [50, 1, 44, 5])[None].astype(np.int32)
    missing = np.asarray(fisher_init.queries_outside(segments, WINDOW))[0]
    row, position = segments[0], np.arange(100)
    wanted = [np.sum((row == row[p]) & (position > p + WINDOW)) for p in range(100)]
    np.testing.assert_array_equal(missing[row >= 0], np.asarray(wanted)[row >= 0])
    weight = np.asarray(fisher_init.label_weights(segments, missing[None], 1))[0]
    expected = np.where((row >= 0) & (missing >= fisher_init.MIN_QUERIES), 1.0, 0.0)
    expected[[0, 51]] = fisher_init.SINK_WEIGHT
    np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("shift", [0, 1])
def test_sums_and_fit_are_a_weighted_ridge_regression(rng, shift):
    """Against NumPy in fp64: the label of pair t is regressed on the residual stream of token t + shift."""
    model, rows = model_of(shift), tokens(rng, 2, 120)
    segments = np.repeat([[1, 2], [1, -1]], [70, 50], axis=1).astype(np.int32)
    examples = np.arange(2, dtype=np.int32)
    sums = labels_of(model, rows, segments)
    values, stream = (np.asarray(x, np.float64) for x in information_of(model)(rows, segments, examples, 0))
    missing = np.asarray(fisher_init.queries_outside(segments, WINDOW))
    weight = np.asarray(fisher_init.label_weights(segments, missing, shift), np.float64)
    per_query = values / np.maximum(missing, 1)[None, :, None]
    counted = np.broadcast_to((weight > 0)[None, :, None], per_query.shape)
    np.testing.assert_allclose(sums.floor, fisher_init.FLOOR * np.median(per_query[counted]), rtol=0.05)
    u = np.asarray(unit_rms(jnp.asarray(stream, jnp.float32), model.config.rms_norm_eps), np.float64)
    end = 120 - shift
    fitted, layers = fit(sums), range(model.config.num_layers)
    w = weight[:, :end].reshape(-1)
    labels_of_layer = [
        np.log(per_query[layer, :, :, :end] + float(sums.floor)).transpose(0, 2, 1).reshape(len(w), -1)
        for layer in layers
    ]
    offset = np.mean([w @ labels / w.sum() for labels in labels_of_layer])
    for layer in layers:
        features = u[layer][:, shift:].reshape(-1, u.shape[-1])
        products = (features * w[:, None]).T @ features / w.sum()
        products += fisher_init.RIDGE * np.trace(products) / len(products) * np.eye(len(products))
        right = np.concatenate([labels_of_layer[layer] - offset, np.ones((len(w), 1))], axis=1)
        solution = np.linalg.solve(products, (features * w[:, None]).T @ right / w.sum())
        np.testing.assert_allclose(fitted.value[layer], solution[:, :-1], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(fitted.constant[layer], solution[:, -1], rtol=2e-3, atol=2e-3)


def test_layer_granularity_values_the_pairs_of_all_heads(rng):
    """Where head 0 decides for its layer, all heads get the label of the sum over heads."""
    model = model_of(granularity="layer")
    rows, zeros = tokens(rng, 1, 60), np.zeros((1, 60), np.int32)
    sums = labels_of(model, rows)
    values = np.asarray(information_of(model)(rows, zeros, np.zeros(1, np.int32), 0)[0], np.float64).sum(2)[:, 0]
    missing = np.asarray(fisher_init.queries_outside(zeros, WINDOW))
    weight = np.asarray(fisher_init.label_weights(zeros, missing, 0), np.float64)[0]
    wanted = np.log(values / np.maximum(missing[0], 1) + float(sums.floor)) @ weight
    np.testing.assert_allclose(sums.labels, np.repeat(wanted[:, None], 4, axis=1), rtol=1e-4)


def test_labels_of_batches_add_up(rng):
    """Two rows at once, or one after the other with the same floor; a row of padding adds nothing."""
    model, rows = model_of(), tokens(rng, 2, 60)
    both = labels_of(model, rows)
    start = no_labels(model.config)
    first = labels_of(model, rows[:1], examples=np.int32([0]))
    floored = start._replace(floor=both.floor, weight=jnp.float32(1e-30))
    one = labels_of(model, rows[:1], examples=np.int32([0]), sums=floored)
    two = labels_of(model, rows[1:], examples=np.int32([1]), sums=one)
    padding = labels_of(model, rows[1:], np.full((1, 60), -1, np.int32), np.int32([1]), sums=two)
    for name, a, b, c in zip(LabelSums._fields, both, two, padding, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(b, c, err_msg=name)
    assert float(first.floor) > 0


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x2x2"])
def test_labels_do_not_depend_on_the_mesh(rng, mesh):
    model, rows = model_of(), tokens(rng, 8, 64)
    segments, examples = np.zeros((8, 64), np.int32), np.arange(8, dtype=np.int32)
    alone = labels_of(model, rows, segments, examples)
    with jax.set_mesh(make_mesh(*map(int, mesh.split("x")))):
        sharded = labels_of(model, rows, segments, examples)
    for name, a, b in zip(LabelSums._fields, alone, sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max(), err_msg=name)


def test_projection_evicts_the_wanted_fraction(rng):
    """Of normally distributed features, whose last entry is constant, with labels that are linear in them."""
    count, size = 40_000, 6
    u = rng.normal(size=(2, count, size)).astype(np.float32)
    u[..., -1] = 1.0
    true = rng.normal(size=(2, size, 3)).astype(np.float32)
    labels = u @ true
    sums = LabelSums(
        jnp.float32(1e-9),
        jnp.float32(count),
        u.sum(1),
        np.einsum("ltd,lte->lde", u, u),
        labels.sum(1),
        np.einsum("ltd,ltk->ldk", u, labels),
    )
    dms = DMSConfig(evict_logit_scale=100.0, evict_logit_bias=5.0)
    for fraction in (0.2, 0.75):
        projection = np.asarray(fit(sums).projection(dms, fraction))
        logits = 100.0 * u @ projection - 5.0
        assert abs((logits > 0).mean() - fraction) < 0.06
        assert logits.std() == pytest.approx(fisher_init.SPREAD, rel=0.05)
        assert np.corrcoef(-logits.ravel(), labels.ravel())[0, 1] > 0.99  # the least valuable are evicted first


def test_no_recompilation(rng):
    """Sums and rows of equal shape run the program that the first batch compiled."""
    model, rows = model_of(), tokens(rng, 2, 60)
    segments, examples = np.zeros((2, 60), np.int32), np.arange(2, dtype=np.int32)
    add = jax.jit(lambda sums, *batch: add_labels(sums, model, *batch, 0))
    sums = add(no_labels(model.config), rows, segments, examples)
    add(sums, rows[::-1].copy(), segments, examples + 2)
    assert add._cache_size() == 1
