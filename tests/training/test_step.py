"""One step: against autodiff, in micro-batches, and without surprises. On many meshes: test_sharding_table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from retrofit_cases import BATCH, DMS, LENGTH, STEP, batch, mesh_of, place, retrofit, train

from dms_jax.models.parameters import flatten
from dms_jax.training.step import Retrofit

GRADIENT = 1e-5  # of the gradient norm


def same_run(expected, actual):
    """Losses of the first step to 1e-5, its gradient norm to GRADIENT. Adam then divides by the gradient's own size, so an entry
    whose gradient is rounding error moves by a full learning rate in a direction that rounding decides: later losses to 1e-3."""
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        for key, value in theirs.items():
            if key == "optim/grad_norm":
                assert step or ours[key] == pytest.approx(
                    value, rel=GRADIENT, abs=1e-6
                )  # 0 where nothing outside the window is gated
            else:
                assert ours[key] == pytest.approx(value, rel=1e-3 if step else 1e-5, abs=1e-4 if step else 1e-6), (
                    step,
                    key,
                )


@pytest.mark.parametrize("mode", ["adapter", "full", "borrowed"])
def test_gradients_are_those_of_the_losses(mode):
    run = retrofit(step=dataclasses.replace(STEP, mode=mode, ramp_steps=1 if mode == "borrowed" else 0))
    total = jax.grad(
        lambda p: run._losses(p, run.frozen, batch(), jnp.int32(2), jnp.float32(batch().loss_mask.sum()))[0]
    )(run.state.trainable)
    ours = run._gradients(run.state._replace(step=jnp.int32(2)), run.frozen, batch())[0]
    for name in total:
        np.testing.assert_allclose(ours[name], total[name], rtol=1e-5, atol=1e-6, err_msg=name)


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
    before = flatten(tiny_model(DMS))
    train(run)
    after = flatten(run.trained_model(run.state))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"layers.attention.evict_norm", "layers.attention.evict_proj"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(run.state.trainable))


def test_the_teacher_of_an_adapter_is_the_dense_base():
    run = retrofit()
    ids = batch().tokens
    np.testing.assert_array_equal(
        run.teacher_model(run.state.trainable, run.frozen).dense(ids), tiny_model(None).dense(ids)
    )


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
    run = Retrofit(
        tiny_model(DMS), tiny_model(None), dataclasses.replace(STEP, mode="full"), mesh_of(1, 1), jnp.bfloat16
    )
    train(run, 1)
    assert all(x.dtype == jnp.float32 for x in run.state.trainable.values())
    assert flatten(run.trained_model(run.state))["layers.attention.q"].dtype == jnp.bfloat16
