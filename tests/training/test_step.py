"""One retrofit step: its gradients, its micro-batches, and what it changes.

Meshes are tested in test_sharding_table.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from retrofit_cases import BATCH, CONFIG, DMS, LENGTH, advance, batch, config_of, mesh_of, retrofit, run_of, train

from dms_jax.models.parameters import flatten
from dms_jax.training.placement import local_rows, place

GRADIENT = 1e-5  # relative tolerance of the gradient norm


def same_run(expected, actual):
    """Compare the losses of the first step to 1e-5, its gradient norm to GRADIENT, and later losses to 1e-3.

    Adam divides by the size of the gradient, so an entry whose gradient is only rounding error moves by a full learning
    rate in a direction that rounding decides.
    """
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        for key, value in theirs.items():
            if key == "optim/grad_norm":
                # The norm is 0 if nothing outside the window is gated.
                assert step or ours[key] == pytest.approx(value, rel=GRADIENT, abs=1e-6)
            else:
                assert ours[key] == pytest.approx(value, rel=1e-3 if step else 1e-5, abs=1e-4 if step else 1e-6), (
                    step,
                    key,
                )


@pytest.mark.parametrize("mode", ["adapter", "full", "borrowed"])
def test_gradients_equal_autodiff_of_the_losses(mode):
    run = retrofit(config=config_of(mode))
    loss = lambda p: run.math.losses(p, run.frozen, batch(), jnp.int32(2), jnp.float32(batch().loss_mask.sum()))[0]
    total = jax.jit(jax.grad(loss))(run.state.trainable)
    ours = jax.jit(run.math.gradients)(run.state._replace(step=jnp.int32(2)), run.frozen, batch())[0]
    for name in total:
        np.testing.assert_allclose(ours[name], total[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("accumulate, mesh", [(2, (1, 1)), (8, (1, 1)), (2, (4, 2))])
def test_micro_batches_add_up_to_the_batch(accumulate, mesh):
    whole, parts = retrofit(), retrofit(mesh, dataclasses.replace(CONFIG, accumulate=accumulate))
    same_run(train(whole, packed=True), train(parts, packed=True))


def test_step_is_compiled_once_donates_its_state_and_keeps_its_shardings():
    run = retrofit((4, 2))
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    old = run.state.trainable
    train(run, 4)
    assert run.steps.step.num_compiled() == 1
    assert jax.tree.map(lambda x: x.sharding, run.state) == shardings
    assert all(x.is_deleted() for x in jax.tree.leaves(old))


def test_adapter_changes_the_evict_head_only():
    run = retrofit()
    before = flatten(tiny_model(DMS))
    train(run)
    after = flatten(run.math.student_model(run.state.trainable, run.frozen))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"layers.attention.evict_norm", "layers.attention.evict_proj"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(run.state.trainable))


def test_teacher_of_an_adapter_is_the_dense_base():
    run = retrofit()
    ids = batch().tokens
    np.testing.assert_array_equal(
        run.math.teacher_model(run.state.trainable, run.frozen).dense(ids), tiny_model(None).dense(ids)
    )


def test_step_that_is_not_finite_changes_nothing():
    run = retrofit()
    bad = run.state.trainable["layers.attention.evict_norm"].at[1, 0].set(jnp.nan)
    run.state = run.state._replace(trainable=run.state.trainable | {"layers.attention.evict_norm": bad})
    before = jax.device_get(run.state)
    metrics = advance(run, batch())
    assert not bool(metrics["finite"])
    for a, b in zip(jax.tree.leaves(jax.device_get(run.state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    finite = run.steps.finite_gradients(run.state, run.frozen, place(batch(), run.mesh))
    assert not np.all(finite["layers.attention.evict_proj"])


def test_fully_masked_batch_has_zero_loss():
    run = retrofit()
    empty = batch()._replace(loss_mask=np.zeros((BATCH, LENGTH), bool))
    metrics = advance(run, empty)
    assert float(metrics["loss/distill"]) == 0.0 and np.isfinite(float(metrics["loss/total"]))


def test_retrofitting_reaches_its_target():
    """From a head that keeps everything, the evicted fraction follows the schedule and stays at its end."""
    config = dataclasses.replace(CONFIG, steps=60, cr_steps=30, initial_cr=1.0)
    dms = dataclasses.replace(DMS, evict_logit_bias=5.0, target_cr=2.0, tau=0.1, evict_logit_scale=100.0)
    run = run_of(tiny_model(dms, evict_scale=0.0), None, config, (1, 1))
    seen = train(run, 60)
    assert seen[0]["cache/evict_fraction"] < 0.05
    assert 0.4 < np.mean([m["cache/evict_fraction"] for m in seen[-10:]]) < 0.7
    assert np.mean([m["loss/compression"] for m in seen[-10:]]) < 0.1


def test_master_weights_stay_fp32_in_a_bf16_run():
    run = run_of(tiny_model(DMS), tiny_model(None), config_of("full"), (1, 1), jnp.bfloat16)
    train(run, 1)
    assert all(x.dtype == jnp.float32 for x in run.state.trainable.values())
    assert flatten(run.math.student_model(run.state.trainable, run.frozen))["layers.attention.q"].dtype == jnp.bfloat16


def test_place_of_a_part_of_the_rows_equals_place_of_all():
    host, mesh = batch(), mesh_of(4, 2)
    first, count = local_rows(BATCH, mesh)
    assert (first, count) == (0, BATCH)  # one process holds all rows
    part = place(jax.tree.map(lambda x: x[first : first + count], host), mesh, BATCH, first)
    jax.tree.map(np.testing.assert_array_equal, part, host)
    assert jax.tree.map(lambda x: x.sharding, part) == jax.tree.map(lambda x: x.sharding, place(host, mesh))
