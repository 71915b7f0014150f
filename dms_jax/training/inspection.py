"""Inspect a model before its retrofit: what eviction costs at each compression ratio, and which ratio it bears.

The head is fitted as a retrofit with `init=fisher` fits it. The proxy of `eviction_curve` on held-out rows gives the
curve; a few of these rows also run with hard decisions, which measures the KL and the factor between the two. Begin
with `inspect_model`.
"""

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from dms_jax.axes import Array
from dms_jax.command import typed_as
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core.cr_schedule import evict_fraction, realised_cr
from dms_jax.core.eviction import align_to_pairs
from dms_jax.engine.calibration import MAX_THRESHOLD, threshold_for
from dms_jax.errors import ConfigError
from dms_jax.evaluation.held_out import held_out_report
from dms_jax.hf.folder import open_source, resolve
from dms_jax.hf.hf_weights import to_host
from dms_jax.training.data.default_assets import default_model
from dms_jax.training.data.rows import PADDING, Batch
from dms_jax.training.eviction_curve import highest_scores, highest_scores_per_head, pairs_to_evict, proxy
from dms_jax.training.fisher_init import LabelSums, add_information, first_rows, gate_information, labeled_pairs
from dms_jax.training.head_fit import refined
from dms_jax.training.inspection_report import Curve, Inspection, Measured
from dms_jax.training.label_file import LabelFile
from dms_jax.training.label_pass import check_counted, check_finite, place_rows
from dms_jax.training.placement import place
from dms_jax.training.prepare import PreparedRun, prepare
from dms_jax.training.retrofit_config import RetrofitConfig
from dms_jax.training.step import EVICT_PROJECTION, TrainState
from dms_jax.training.step_functions import OnMesh
from dms_jax.training.validate import first_batches, hard_rows, on_mesh, scores_of_rows

RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # realised at the end of a row
MEASURED = (2.0, 4.0)  # of them, those at which rows also run with hard decisions
MEASURED_ROWS = 2
SHIFTS = (0, 1)


class Pairs(NamedTuple):
    """The pairs of held-out rows that can leave their row, n of them in each head."""

    cost: np.ndarray  # fp32 [L K n], Fisher information of their gates; 0 for padding
    scores: dict[int, np.ndarray]  # decision_shift -> evict logits [L K n] of the fitted head in the dense model
    num_rows: int
    num_tokens: int  # padding not counted

    def first(self, num_rows: int, num_tokens: int) -> "Pairs":
        """Return the pairs of the first `num_rows` rows, which have `num_tokens` tokens."""
        end = self.cost.shape[-1] * num_rows // self.num_rows
        scores = {shift: score[..., :end] for shift, score in self.scores.items()}
        return Pairs(self.cost[..., :end], scores, num_rows, num_tokens)


def inspect_model(config: RetrofitConfig) -> Inspection:
    """Fit the head, and measure what it costs. JAX must have been started for `config.mesh`; nothing is written."""
    ratios = reachable_ratios(config.length, config.dms.window_size)
    run = prepare(_without_policy(config))
    if not run.held_out.num_rows:
        raise ConfigError("an inspection needs held-out rows; raise data.held_out_fraction or set data.eval_paths")
    for note in run.notes:
        run.say(note)
    add = label_function(run)
    heads = fitted_heads(run, add)
    state = run.steps.initial_state(run.trainable)
    states = {shift: state.with_projection(head) for shift, head in heads.items()}
    batches = first_batches(run, run.held_out, run.config.eval_rows)
    pairs = held_out_pairs(run, add, states, batches)
    dms = run.steps.math.dms
    curve = curve_of(pairs, dms, run.config.length, ratios)
    rows = batches[: math.ceil(MEASURED_ROWS / len(batches[0].tokens))]
    measured = _measure(run, states[dms.decision_shift], pairs, rows, ratios)
    return Inspection(
        model=run.model_path,
        length=run.config.length,
        window_size=dms.window_size,
        decision_shift=dms.decision_shift,
        label_rows=run.config.label_rows,
        held_out_rows=pairs.num_rows,
        held_out_tokens=pairs.num_tokens,
        measured_rows=_num_rows(rows),
        curve=curve,
        measured=measured,
    )


def _without_policy(config: RetrofitConfig) -> RetrofitConfig:
    """Return the configuration with its model resolved, unless the model already has a policy."""
    path = resolve(config.model or default_model(config.data.cache_dir))
    if open_source(path)[1].dms is not None:
        raise ConfigError(
            f"model {path} already has a policy, and an inspection fits a new one; inspect its base model, or measure "
            f"its policy with {typed_as('evaluate')}"
        )
    return dataclasses.replace(config, model=path)


def reachable_ratios(length: int, window_size: int) -> tuple[float, ...]:
    """Return those of RATIOS that rows can realise although their window stays. Say on stderr which are left out."""
    highest = realised_cr(math.inf, length, window_size)
    why = f"rows of {length} tokens with a window of {window_size} realise at most CR {highest:.2f}"
    found = tuple(cr for cr in RATIOS if cr <= highest)
    if not found:
        raise ConfigError(f"{why}; use a larger length or a smaller dms.window_size")
    if left_out := RATIOS[len(found) :]:
        print(f"note: {why}, so CR {' and '.join(f'{cr:g}' for cr in left_out)} cannot be inspected", file=sys.stderr)
    return found


def label_function(run: PreparedRun) -> OnMesh:
    """Return the function (sums, state, frozen, batch) -> (sums, pairs, values).

    Sums and pairs are of each `decision_shift`, and the values are those of `gate_information`. The fit needs sums and
    pairs, and the held-out rows need values. Both use this one program, because compiling a gradient takes as long as
    several rows.
    """
    math_ = run.steps.math

    def add(sums, state, frozen, batch):
        student = math_.student_model(state.trainable, frozen)
        values, stream = gate_information(
            student, batch.tokens, batch.segment_ids, batch.examples, run.config.seed, math_.remat
        )
        of_rows, who = (values, stream, batch.segment_ids), (batch.examples, run.config.seed)
        new = {shift: add_information(old, _with_shift(run, shift), *of_rows) for shift, old in sums.items()}
        return new, {shift: labeled_pairs(_with_shift(run, shift), *of_rows, *who) for shift in sums}, values

    labels = jax.tree.map(lambda x: x.sharding, run.steps.abstract_labels)
    out = dict.fromkeys(SHIFTS, labels), None, NamedSharding(run.mesh, PartitionSpec())
    return OnMesh(add, run.mesh, out, donate=(0,))


def no_sums(run: PreparedRun) -> dict[int, LabelSums]:
    return {shift: run.steps.no_labels() for shift in SHIFTS}


def _with_shift(run: PreparedRun, shift: int) -> ModelConfig:
    """Return the configuration of the model with another `decision_shift`."""
    math_ = run.steps.math
    dms = dataclasses.replace(math_.dms, decision_shift=shift)  # pyrefly: ignore[bad-argument-type]  # one of SHIFTS
    return math_.student.config.with_dms(dms)


def fitted_heads(run: PreparedRun, add: OnMesh) -> dict[int, Array]:
    """Fit the evict head to the label rows of a retrofit, for each `decision_shift`. Returns projections [L D K].

    `add` is the function of `label_function`.
    """
    c, steps, dms = run.config, run.steps, run.steps.math.dms
    state, sums = steps.initial_state(run.trainable), no_sums(run)
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        bar = held.enter_context(tqdm(total=c.label_rows, unit="row", desc="labels"))
        files = {}
        for shift in SHIFTS:
            (folder / str(shift)).mkdir()
            files[shift] = LabelFile(folder / str(shift), _with_shift(run, shift), c.label_rows, c.length)
            held.enter_context(contextlib.closing(files[shift]))
        for start in range(0, c.label_rows, c.batch_size):
            end = min(start + c.batch_size, c.label_rows)
            sums, pairs, _ = add(sums, state, run.frozen, place_rows(run, start, c.batch_size))
            check_finite(sums[dms.decision_shift], start, end)
            for shift, of_shift in pairs.items():
                files[shift].write(start, first_rows(jax.tree.map(to_host, of_shift), end - start))
            bar.update(end - start)
        check_counted(sums[dms.decision_shift], dms.window_size)
        return {shift: _fitted_projection(run, sums[shift], files[shift]) for shift in SHIFTS}


def _fitted_projection(run: PreparedRun, sums: LabelSums, file: LabelFile) -> Array:
    file.flush()
    head = jax.tree.map(to_host, run.steps.fit(sums))
    head, _ = refined(head, lambda layer: file.read(layer, 0, run.config.label_rows))
    dms, projection = run.steps.math.dms, run.steps.abstract_state.trainable[EVICT_PROJECTION]
    return jax.device_put(head.projection(dms, evict_fraction(dms.target_cr)), projection.sharding)


def held_out_pairs(run: PreparedRun, add: OnMesh, states: dict[int, TrainState], batches: list[Batch]) -> Pairs:
    """Compute the cost of each pair of held-out rows, and its scores under the heads of `states`.

    `add` is the function of `label_function`.
    """
    settled = run.config.length - 1 - run.steps.math.dms.window_size
    costs, scores = [], {shift: [] for shift in states}
    with tqdm(total=_num_rows(batches), unit="row", desc="held-out rows") as bar:
        for batch in batches:
            *_, values = add(no_sums(run), states[0], run.frozen, place(batch, run.mesh))
            counted = (batch.segment_ids != PADDING)[None, :, None]
            costs.append(np.where(counted, np.asarray(values), 0)[..., :settled])
            for shift, state in states.items():
                logits = jnp.asarray(scores_of_rows(run, state, [batch])(MAX_THRESHOLD))
                scores[shift].append(np.asarray(align_to_pairs(logits, shift, 0.0))[..., :settled])
            bar.update(len(batch.tokens))
    return Pairs(
        _by_head(costs),
        {shift: _by_head(parts) for shift, parts in scores.items()},
        _num_rows(batches),
        _num_tokens(batches),
    )


def _by_head(parts: list[np.ndarray]) -> np.ndarray:
    """Join batches [L B K n] to [L K B*n]."""
    whole = np.concatenate(parts, axis=1).swapaxes(1, 2)
    return whole.reshape(*whole.shape[:2], -1)


def curve_of(pairs: Pairs, dms: DMSConfig, length: int, ratios: tuple[float, ...]) -> Curve:
    """Compute the proxy of each rule at each ratio, and the share of pairs that each head keeps."""
    score, cost = pairs.scores[dms.decision_shift], pairs.cost
    # With one decision for all heads of a layer, their pairs leave together, and so cost what they cost together.
    oracle = -cost if dms.granularity == "head" else -np.broadcast_to(cost.mean(axis=1, keepdims=True), cost.shape)
    numbers = [pairs_to_evict(cr, pairs.num_rows, length) for cr in ratios]

    def proxies(rule: Callable, values: np.ndarray) -> list[float]:
        return [proxy(cost, rule(values, number), pairs.num_tokens) for number in numbers]

    evicted = [np.sum(highest_scores(score, number), axis=-1) for number in numbers]
    return Curve(
        ratios,
        common=proxies(highest_scores, score),
        equal=proxies(highest_scores_per_head, score),
        oracle=proxies(highest_scores, oracle),
        other_shift=proxies(highest_scores, pairs.scores[1 - dms.decision_shift]),
        kept=1 - np.stack(evicted) / (pairs.num_rows * length),
    )


def _measure(
    run: PreparedRun, state: TrainState, pairs: Pairs, rows: list[Any], ratios: tuple[float, ...]
) -> list[Measured]:
    """Run `rows`, the first of `pairs`, with hard decisions at the ratios MEASURED, or at the highest reachable one."""
    dms, length = run.steps.math.dms, run.config.length
    scores, placed = scores_of_rows(run, state, rows), on_mesh(run, state, rows)
    subset = pairs.first(_num_rows(rows), _num_tokens(rows))
    score = subset.scores[dms.decision_shift]
    found = []
    for cr in tqdm([cr for cr in ratios if cr in MEASURED] or ratios[-1:], unit="ratio", desc="hard decisions"):
        evicted = highest_scores(score, pairs_to_evict(cr, subset.num_rows, length))
        threshold = threshold_for(scores, dms, cr, 0.02, most_runs=6, start=float(score[evicted].min()))
        result = held_out_report(placed, length, hard_rows(run, state, threshold)).results[0]
        alone = proxy(subset.cost, evicted, subset.num_tokens)
        found.append(Measured(cr, result.realised_cr, result.kl_mean, result.kl_p99, result.perplexity_change, alone))
    return found


def _num_rows(batches: list[Batch]) -> int:
    return sum(len(batch.tokens) for batch in batches)


def _num_tokens(batches: list[Batch]) -> int:
    """Count the tokens of rows on the host, without padding."""
    return sum(int(np.sum(batch.segment_ids != PADDING)) for batch in batches)
