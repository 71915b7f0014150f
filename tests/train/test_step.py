"""One step on many meshes, in micro-batches, and without surprises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model, tokens
from jax.sharding import AxisType, Mesh

from dms_jax.config import DMSConfig
from dms_jax.models.parameters import params_of
from train.retrofit_config import LossConfig, OptimizerConfig
from train.rows import Batch
from train.step import Retrofit, StepConfig

LENGTH, BATCH = 32, 8
GRADIENT = 1e-5  # of the largest entry of each gradient
# Scale and temperature: at the released 100 and 0.1 the rounding of the residual stream is a thousand times as large in z, and with it
# in the gradients; at 10 and 2 five times. What a mesh could get wrong does not depend on them.
DMS = DMSConfig(window_size=4, target_cr=4.0, evict_logit_bias=1.0, tau=2.0, evict_logit_scale=10.0)
STEP = StepConfig(mode="adapter", seed=1, length=LENGTH, steps=10, accumulate=1, initial_cr=3.0, ramp_steps=0, cr_steps=5, remat="full",
                  loss=LossConfig(), optimizer=OptimizerConfig(learning_rate=1e-3))  # fmt: skip


def mesh_of(data, model):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def retrofit(mesh=(1, 1), step=STEP, dms=DMS, seed=0):
    if step.mode == "borrowed":
        dms = dataclasses.replace(dms, variant="borrowed")
    teacher = None if step.mode == "adapter" else tiny_model(None, seed)
    return Retrofit(tiny_model(dms, seed, evict_scale=1.0), teacher, step, mesh_of(*mesh), jnp.float32)


def batch(first_step=0, packed=False):
    rng = np.random.default_rng(first_step)
    segments = np.sort(rng.integers(1, 3, (BATCH, LENGTH)), axis=1).astype(np.int32) if packed else np.zeros((BATCH, LENGTH), np.int32)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, 20:] = False
    return Batch(tokens(rng, BATCH, LENGTH), segments, mask, np.arange(first_step * BATCH, (first_step + 1) * BATCH, dtype=np.int32))


def place(run, host):
    return run.place(lambda start, count: Batch(*(x[start : start + count] for x in host)), len(host.tokens))


def train(run, steps=3, packed=False):
    seen = []
    for i in range(steps):
        run.state, metrics = run.step(run.state, run.frozen, place(run, batch(i, packed)))
        seen.append({key: float(value) for key, value in metrics.items()})
    return seen


def same_run(expected, actual):
    """Losses of the first step to 1e-5, its gradient norm to GRADIENT. Adam then divides by the gradient's own size, so an entry
    whose gradient is rounding error moves by a full learning rate in a direction that rounding decides: later losses to 1e-3."""
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        for key, value in theirs.items():
            if key == "optim/grad_norm":
                assert step or ours[key] == pytest.approx(value, rel=GRADIENT, abs=1e-6)  # 0 where nothing outside the window is gated
            else:
                assert ours[key] == pytest.approx(value, rel=1e-3 if step else 1e-5, abs=1e-4 if step else 1e-6), (step, key)


@pytest.mark.parametrize("mode", ["adapter", "full", "borrowed"])
@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4), (1, 1)])
def test_every_mesh_gives_the_same_run(mesh, mode):
    step = dataclasses.replace(STEP, mode=mode, ramp_steps=1 if mode == "borrowed" else 0)
    if mesh == (1, 1):  # the others against the plain computation, this one against autodiff of the sum of its losses
        run = retrofit(step=step)
        total = jax.grad(lambda p: run._losses(p, run.frozen, batch(), jnp.int32(2), jnp.float32(batch().loss_mask.sum()))[0])(run.state.trainable)
        ours = run._gradients(run.state._replace(step=jnp.int32(2)), run.frozen, batch())[0]
        for name in total:
            np.testing.assert_allclose(ours[name], total[name], rtol=1e-5, atol=1e-6, err_msg=name)
        return
    plain, sharded = retrofit(step=step), retrofit(mesh, step=step)
    gradients = [jax.device_get(r.finite_gradients(r.state, r.frozen, place(r, batch()))) for r in (plain, sharded)]
    assert all(np.all(ok) for tree in gradients for ok in tree.values())
    same_run(train(plain), train(sharded))


def test_gradients_and_gates_are_equal_on_every_mesh():
    runs = {mesh: retrofit(mesh) for mesh in ((1, 1), (8, 1), (4, 2), (2, 4))}
    results = {}
    for mesh, run in runs.items():
        with jax.set_mesh(run.mesh):
            grads, metrics = jax.jit(run._gradients)(run.state, run.frozen, place(run, batch()))
        results[mesh] = jax.device_get((grads, metrics))
    for mesh, (grads, metrics) in results.items():
        for name, expected in results[1, 1][0].items():
            np.testing.assert_allclose(grads[name], expected, rtol=GRADIENT, atol=GRADIENT * np.abs(expected).max(), err_msg=f"{mesh} {name}")
        assert metrics["cache/evict_fraction"] == pytest.approx(results[1, 1][1]["cache/evict_fraction"], abs=1e-7)  # the same 0/1 gates
        np.testing.assert_allclose(metrics["loss/total"], results[1, 1][1]["loss/total"], rtol=1e-5)


@pytest.mark.parametrize("accumulate, mesh", [(2, (1, 1)), (8, (1, 1)), (2, (4, 2))])
def test_micro_batches_add_up_to_the_batch(accumulate, mesh):
    whole, parts = retrofit(), retrofit(mesh, dataclasses.replace(STEP, accumulate=accumulate))
    same_run(train(whole, packed=True), train(parts, packed=True))


def test_one_compilation_and_pinned_shardings():
    run = retrofit((4, 2))
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    old = run.state.trainable
    train(run, 4)
    assert run.step.cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, run.state) == shardings
    assert all(x.is_deleted() for x in jax.tree.leaves(old))  # donated


def test_an_adapter_changes_the_evict_head_only():
    run = retrofit()
    before = params_of(tiny_model(DMS))
    train(run)
    after = params_of(run.trained_model(run.state))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"layers.attention.evict_norm", "layers.attention.evict_proj"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(run.state.trainable))


def test_the_teacher_of_an_adapter_is_the_dense_base():
    run = retrofit()
    ids = batch().tokens
    np.testing.assert_array_equal(run.teacher_model(run.state.trainable, run.frozen).dense(ids), tiny_model(None).dense(ids))


def test_a_step_that_is_not_finite_changes_nothing():
    run = retrofit()
    bad = run.state.trainable["layers.attention.evict_norm"].at[1, 0].set(jnp.nan)
    run.state = run.state._replace(trainable=run.state.trainable | {"layers.attention.evict_norm": bad})
    before = jax.device_get(run.state)
    run.state, metrics = run.step(run.state, run.frozen, place(run, batch()))
    assert not bool(metrics["finite"])
    for a, b in zip(jax.tree.leaves(jax.device_get(run.state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    finite = run.finite_gradients(run.state, run.frozen, place(run, batch()))
    assert not np.all(finite["layers.attention.evict_proj"])


def test_all_masked_batch_has_zero_loss():
    run = retrofit()
    empty = batch()._replace(loss_mask=np.zeros((BATCH, LENGTH), bool))
    _, metrics = run.step(run.state, run.frozen, place(run, empty))
    assert float(metrics["loss/distill"]) == 0.0 and np.isfinite(float(metrics["loss/total"]))


def test_retrofitting_reaches_its_target():
    """From a head that keeps everything: the gates go where the schedule says and stay there."""
    step = dataclasses.replace(STEP, steps=60, cr_steps=30, initial_cr=1.0)
    dms = dataclasses.replace(DMS, evict_logit_bias=5.0, target_cr=2.0, tau=0.1, evict_logit_scale=100.0)
    run = Retrofit(tiny_model(dms, evict_scale=0.0), None, step, mesh_of(1, 1), jnp.float32)
    seen = train(run, 60)
    assert seen[0]["cache/evict_fraction"] < 0.05
    assert 0.4 < np.mean([m["cache/evict_fraction"] for m in seen[-10:]]) < 0.7
    assert np.mean([m["loss/compression"] for m in seen[-10:]]) < 0.1


def test_master_weights_stay_fp32_in_a_bf16_run():
    run = Retrofit(tiny_model(DMS), tiny_model(None), dataclasses.replace(STEP, mode="full"), mesh_of(1, 1), jnp.bfloat16)
    train(run, 1)
    assert all(x.dtype == jnp.float32 for x in run.state.trainable.values())
    assert params_of(run.trained_model(run.state))["layers.attention.q"].dtype == jnp.bfloat16
