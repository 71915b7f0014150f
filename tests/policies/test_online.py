"""Policies online, chunk by chunk and token by token, against a simulation; their names and flags."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from cases import TINY, tiny_model, tokens

import dms_jax
from dms_jax.core import compact_cache
from dms_jax.core.slot_attention import CacheOps, Chunk, extend_layer, slot_attention
from dms_jax.engine import decoding
from dms_jax.policies import (
    H2O,
    POLICIES,
    TOVA,
    DropKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    ObservedAttention,
    PromptCompression,
    Quest,
    RandomAttention,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
    describe,
    policy_name,
    policy_of,
    restored,
)
from dms_jax.policies.cache_policy import CachePolicy
from dms_jax.reporting.report_summary import LEARNED

B, K, G, H, T, C, BUDGET = 2, 2, 2, 8, 30, 12, 9
METHODS = {
    "streaming_llm": StreamingLLM(BUDGET, 2),
    "tova": TOVA(BUDGET),
    "h2o": H2O(BUDGET),
    "observed_attention": ObservedAttention(BUDGET),
    "snapkv": SnapKV(BUDGET, 3, 3),
    "knorm": KNorm(BUDGET),
    "keydiff": KeyDiff(BUDGET),
    "dropkv": DropKV(BUDGET, 3, 3),
    "expected_attention": ExpectedAttention(BUDGET, num_future=5, num_sinks=1),
    "random_all": RandomEviction(BUDGET),
    "random_attention": RandomAttention(BUDGET, 2),
    "vase": VaSE(BUDGET, 1, 3, num_sinks=1),
}
METHODS |= {
    f"adakv:{name}": dataclasses.replace(METHODS[name], adakv_heads=K)
    for name in ("h2o", "observed_attention", "snapkv", "dropkv", "expected_attention")
}
SCHEDULES = {
    "tokens": [[1, 1]] * T,
    "ragged chunks": [[7, 4], [0, 7], [1, 1], [1, 0], [7, 7], [1, 1], [3, 5], [0, 0], [1, 1], [1, 1]],
}


@functools.partial(jax.jit, static_argnames="policy")
def extend(layer, q, k, v, seen, count, policy):
    """Do what an attention layer does with a chunk."""
    position = seen[:, None] + np.arange(q.shape[1])[None]
    expiries = policy.mark(np.zeros(k.shape[:3], np.float32), position, count, 0.0)
    ops = CacheOps(slot_attention, compact_cache.write_pairs)
    return extend_layer(layer, q, k, v, expiries, Chunk(position, count, 0.0), policy, ops)


CONFIG = dataclasses.replace(TINY, num_q_heads=K * G, num_kv_heads=K, head_dim=H)


def empty(policy):
    slots = C + policy.slot_bounds().max - BUDGET
    return compact_cache.empty_layer(B, K, slots, H, np.float32, policy.features, policy.head_state(CONFIG))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def simulate(name, q, k, v, row, held, new, prompt):
    """Return the pairs that each head of a row holds after the tokens `new`.

    After "adakv:", the name means that heads share the budget.

    `held` is one dict per head. It maps a pair's position to the attention that the pair got from each query so far;
    for dropkv, to the squared distance by which outputs would have moved without it. `prompt` are its positions.
    """
    shared, name = name.startswith("adakv:"), name.removeprefix("adakv:")
    for h in range(K):
        for t in new:
            held[h][t] = []
    for t in new:
        for h in range(K):
            there = [p for p in held[h] if p <= t]
            weights = softmax(q[row, t, h * G : h * G + G] @ k[row, h, there].T * H**-0.5)
            paid = output_moves(weights, v[row, h, there]) if name == "dropkv" else weights.mean(0)
            for p, weight in zip(there, paid, strict=True):
                held[h][p].append(weight)
    now = new[-1]
    of_head = lambda h: (q[row, :, h * G : h * G + G], k[row, h], v[row, h], held[h])
    every = [scores(name, *of_head(h), now, h, prompt) for h in range(K)]
    if name == "tova":  # averages over all heads of the layer
        every = [{p: np.mean([s[p] for s in every]) if p < now else 9.0 for p in held[0]} for _ in range(K)]
    stay = [sorted(held[h], key=lambda p: (every[h][p], p))[-BUDGET:] for h in range(K)]
    if shared:
        stay = together(every)
    return [{p: held[h][p] for p in sorted(stay[h])} for h in range(K)]


def together(every):
    """Return the pairs that stay in each head, as kvpress's `adakv_press.py` finds them, given {position: score}.

    A fifth of the budget in each head gets the highest score; then the lowest pairs of all heads leave.
    """
    safe = [sorted(of_head, key=lambda p: (of_head[p], p))[-(BUDGET // 5) :] for of_head in every]
    ranked = sorted(
        (np.inf if p in safe[h] else score, p, h) for h, of_head in enumerate(every) for p, score in of_head.items()
    )
    kept = ranked[-len(every) * BUDGET :]
    return [[p for _, p, head in kept if head == h] for h in range(len(every))]


def output_moves(weights, v):
    """Return how far outputs move [S], squared and averaged over query heads, if one of S pairs leaves: by removing it.

    A single pair, without which there is no output, cannot leave.
    """
    out, without = weights @ v, ~np.eye(len(v), dtype=bool)
    if len(v) == 1:
        return np.zeros(1)
    left = np.stack([weights[:, keep] @ v[keep] / weights[:, keep].sum(1, keepdims=True) for keep in without])
    return ((left - out) ** 2).sum(-1).mean(-1)


def rotation(position):
    """Return the matrix [H, H] by which RoPE multiplies a vector at a position."""
    angle = position * np.tile(CONFIG.rope_theta ** (-np.arange(H // 2) / (H // 2)), 2)
    half = np.eye(H // 2)
    swap = np.block([[np.zeros_like(half), -half], [half, np.zeros_like(half)]])
    return np.diag(np.cos(angle)) + np.diag(np.sin(angle)) @ swap


def expected_attention(q, k, future):
    """Return the attention [S] that keys expect from `future` positions, given queries [T G H] at positions 1 to T."""
    mean_turn = np.mean([rotation(p) for p in future], axis=0)
    of_heads = []
    for head in range(G):
        before = np.stack([rotation(1 + t).T @ row for t, row in enumerate(q[:, head])])
        mean, covariance = mean_turn @ before.mean(0), mean_turn @ np.cov(before.T, bias=True) @ mean_turn.T
        of_heads.append(softmax(k @ mean / H**0.5 + np.einsum("sh,hi,si->s", k, covariance, k) / (2 * H)))
    return np.mean(of_heads, axis=0)


def draw(head, *positions):
    """Return the random number of a pair in a head, drawn with seed 0."""
    key = functools.reduce(jax.random.fold_in, (head, *positions), jax.random.key(0))
    return float(jax.random.uniform(key))


def scores(name, q, k, v, held, now, head, prompt):
    """Return {position: score} by the definition of the method."""
    if name == "knorm":
        return {p: -np.linalg.norm(k[p]) for p in held}
    if name == "keydiff":
        unit = {p: k[p] / np.linalg.norm(k[p]) for p in held}
        anchor = np.mean(list(unit.values()), axis=0)
        return {p: -unit[p] @ anchor for p in held}
    if name == "random_all":
        return {p: draw(head, p) for p in held}
    if name == "random_attention":
        return {p: 2.0 if p in prompt else 1.0 if now - p < 2 else draw(head, now, p) for p in held}
    if name == "tova":
        return {p: paid[-1] for p, paid in held.items()}
    if name == "h2o":
        return {p: np.inf if now - p < BUDGET // 2 else sum(paid) for p, paid in held.items()}
    if name == "observed_attention":
        return {p: sum(paid) / (now - p + 1) for p, paid in held.items()}
    if name == "streaming_llm":
        return {p: 1.0 if p < 2 or now - p < BUDGET - 2 else 0.0 for p in held}
    if name == "expected_attention":
        ranked = [p for p in sorted(held) if p >= 1]
        if not ranked:
            return {0: np.inf}
        attention = expected_attention(q[1 : now + 1], k[ranked], now + 1 + np.arange(5))
        norms = np.linalg.norm(v[ranked], axis=-1)
        return {0: np.inf} | dict(zip(ranked, attention * norms, strict=True))
    window = 1 if name == "vase" else 3
    old = [p for p in sorted(held) if now - p >= window]
    among = sorted(held) if name == "dropkv" else old
    mean = np.pad([sum(held[p][-window:]) / window for p in among], 1)
    pooled = {p: mean[i : i + 3].sum() / 3 for i, p in enumerate(among)}
    if name == "vase":
        noise = {p: -np.log(-np.log(draw(head, now, p))) for p in old}
        size = {p: v[p].max() - v[p].min() if p else np.inf for p in old}
        large = sorted(old, key=size.__getitem__)[-2:]
        pooled = {p: np.inf if p in large else np.log(pooled[p]) + noise[p] for p in old}
    return dict.fromkeys(held, np.inf) | {p: pooled[p] for p in old}


def prompt_of(schedule, row):
    """Return the positions that a row reads in chunks before its first single token; none if they exceed the budget."""
    chunks = itertools.takewhile(lambda counts: max(counts) > 1, schedule)
    length = sum(counts[row] for counts in chunks)
    return range(length if length <= BUDGET else 0)


@pytest.mark.parametrize("name, schedule", list(itertools.product(METHODS, SCHEDULES)))
def test_kept_pairs_and_attention_equal_the_simulation(rng, name, schedule):
    q, k, v = (
        rng.normal(size=s).astype(np.float32) for s in ((B, T + 8, K * G, H), (B, K, T + 8, H), (B, K, T + 8, H))
    )
    policy, seen = METHODS[name], np.zeros(B, np.int32)
    layer = empty(policy)
    held = [[{} for _ in range(K)] for _ in range(B)]
    for counts in SCHEDULES[schedule]:
        count, size = np.array(counts, np.int32), 1 if max(counts) <= 1 else 7
        at = [seen[b] + np.arange(size) for b in range(B)]
        part = lambda x: np.stack([x[b][:, at[b]] for b in range(B)])  # noqa: B023
        out, layer = extend(layer, np.stack([q[b, at[b]] for b in range(B)]), part(k), part(v), seen, count, policy)
        for b in np.flatnonzero(count):
            new = list(range(seen[b], seen[b] + count[b]))
            before = [set(h) for h in held[b]]
            held[b] = simulate(name, q, k, v, b, held[b], new, prompt_of(SCHEDULES[schedule], b))
            for t, h in itertools.product(new, range(K)):
                if name == "streaming_llm":  # its pairs expire within a chunk, too
                    there = [p for p in range(t + 1) if p < 2 or t - p < BUDGET - 2]
                else:
                    there = sorted(before[h]) + [p for p in new if p <= t]
                want = softmax(q[b, t, h * G : h * G + G] @ k[b, h, there].T * H**-0.5) @ v[b, h, there]
                np.testing.assert_allclose(out[b, t - seen[b], h * G : h * G + G], want, atol=1e-5)
        seen = seen + count
        live = np.asarray(layer.expiry) >= seen[:, None, None] - 1
        for b, h in np.ndindex(B, K):
            assert sorted(np.asarray(layer.position)[b, h][live[b, h]].tolist()) == sorted(held[b][h]), (b, h, seen)
            assert live[b, h].sum() <= policy.slot_bounds().max
        assert (live.sum((1, 2)) == np.minimum(seen, BUDGET) * K).all() or name == "random_attention"
    assert not np.asarray(layer.forced_evictions).any()
    assert seen.min() > BUDGET + 4, "the schedule must make pairs leave"


@pytest.mark.parametrize("last", [1, 2])
def test_quest_reads_the_pages_with_the_largest_bounds(rng, last):
    """Read two pages of 4 keys: the query's own page, and the best other one by a bound written out channel by channel.

    A chunk within a page equals decoding token by token.
    """
    policy, n = Quest(8, 4), 22
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, n, K * G, H), (B, K, n, H), (B, K, n, H)))
    layer, zero = compact_cache.empty_layer(B, K, 26, H, np.float32), np.zeros(B, np.int32)
    _, layer = extend(layer, q[:, :-last], k[:, :, :-last], v[:, :, :-last], zero, zero + n - last, policy)
    out, layer = extend(layer, q[:, -last:], k[:, :, -last:], v[:, :, -last:], zero + n - last, zero + last, policy)
    for b, h in np.ndindex(B, K):
        rows = q[b, -1, h * G : h * G + G]
        pages = [k[b, h, i : i + 4] for i in range(0, 20, 4)]
        bound = [
            max(sum(max(r[c] * page[:, c].min(), r[c] * page[:, c].max()) for c in range(H)) for r in rows)
            for page in pages
        ]
        best = int(np.argmax(bound)) * 4
        there = [*range(best, best + 4), 20, 21]
        np.testing.assert_allclose(
            out[b, -1, h * G : h * G + G], softmax(rows @ k[b, h, there].T * H**-0.5) @ v[b, h, there], atol=1e-5
        )
    assert (np.asarray(layer.expiry) >= n - 1).sum(-1).min() == n, "no pair leaves"


@pytest.mark.parametrize("name", METHODS)
def test_contents_of_dead_slots_have_no_effect(rng, name):
    """Write NaN into every dead slot between any two chunks."""
    policy = METHODS[name]
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, 36, K * G, H), (B, K, 36, H), (B, K, 36, H)))

    def run(poison):
        layer, seen, outs = empty(policy), np.zeros(B, np.int32), []
        for size in (7, 7, 1, 1, 7, 7, 1, 1, 1):
            part = slice(seen[0], seen[0] + size)
            out, layer = extend(layer, q[:, part], k[:, :, part], v[:, :, part], seen, np.full(B, size), policy)
            seen = seen + size
            dead = np.asarray(layer.expiry) < seen[:, None, None] - 1
            poisoned = lambda x, dead=dead: x if x is None else np.where(dead[..., None], np.nan, x)
            if poison:
                held = {name: poisoned(getattr(layer, name)) for name in ("k", "v", "statistic")}
                layer = dataclasses.replace(layer, **held)
            outs.append(out)
        return np.concatenate(outs, axis=1), np.where(dead, -1, layer.position)

    for clean, poisoned in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(clean, poisoned)


@pytest.mark.parametrize(
    "name", ["tova", "snapkv:9", "h2o", "keydiff", "dropkv", "expected_attention", "random_all", "vase"]
)
def test_rows_are_independent_and_decoding_compiles_once(rng, name):
    model, ids = tiny_model(None, 3, num_layers=1), tokens(rng, 2, 40)
    name = METHODS.get(name, name)

    def run(rows):
        cache, out = dms_jax.init_cache(model, len(rows), 9, policy=name), []
        _, cache = dms_jax.prefill(model, cache, ids[rows, :20], np.array([20, 13])[rows], chunk_size=16)
        for t in range(20, 26):
            logits, cache = dms_jax.decode_step(model, cache, ids[rows, t])
            assert (np.asarray(cache.live_counts) == 9).all()
            out.append(np.asarray(logits))
            if t == 21:
                compiled = decoding.num_compilations()
        assert decoding.num_compilations() == compiled
        return np.stack(out)

    both = run([0, 1])
    np.testing.assert_allclose(both[:, 1], run([1])[:, 0], atol=1e-5)
    out = dms_jax.generate(
        model, [ids[0, :20].tolist()], dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=(), policy=name)
    )
    assert out.live_pairs[0] == 9


def test_class_flags_match_the_methods_of_each_policy():
    for kind in (*POLICIES.values(), PromptCompression):
        assert kind.ranks_pairs == (kind.select is not CachePolicy.select), kind
        assert kind.reads_subset == (kind.read is not CachePolicy.read), kind
        assert kind.has_budget == ("budget" in kind.__dataclass_fields__), kind
        assert kind.is_learned == ("dms" in kind.__dataclass_fields__), kind
        assert kind.keeps_prompt == (kind.check_prompt is not CachePolicy.check_prompt), kind
        assert kind.compresses_prompt == (kind is PromptCompression), kind


def test_policy_names_are_parsed_or_refused():
    config = tiny_model(None, 0, num_layers=1).config
    assert policy_of(config, "snapkv:40") == SnapKV(40)
    assert policy_of(config, "adakv:snapkv:40") == SnapKV(40, adakv_heads=config.num_kv_heads)
    for name in ("adakv:snapkv:40", "prompt:adakv:h2o:40", "tova:40"):
        policy = policy_of(config, name)
        assert policy_name(policy) == name and restored(describe(policy), config) == policy
    for bad, message in {
        "tovo:3": "did you mean tova",
        "random:3": "did you mean random_all",  # its name in earlier versions
        "tova": "'tova'.*budget.*''",
        "tova:x": "'tova:x'.*budget.*'x'",
        "dms": "'dms'.*retrofitted",
        "dense:3": "'dense:3'.*budget",
        "prompt:quest:64": "'prompt:quest:64'.*rank",
        "adakv:tova:9": "'adakv:tova:9'.*TOVA.*different heads.*snapkv",
        "prompt:adakv:dense": "KeepAll.*different heads",
        "adakv:dms_budget:9": "BudgetedEviction.*different heads",
        "adakv:h2o": "'adakv:h2o'.*budget.*''",
        "prompt:random_attention:64": "'prompt:random_attention:64'.*keeps the prompt",
    }.items():
        with pytest.raises(dms_jax.ConfigError, match=message):
            policy_of(config, bad)


def test_every_policy_with_a_budget_is_compared_with_its_oracle():
    # test_quest_reads_the_pages_with_the_largest_bounds, and tests/core/test_budget_eviction.py
    own_oracle = {"quest", "dms_budget"}
    with_oracle = {name.removeprefix("adakv:") for name in METHODS}
    assert with_oracle | own_oracle == {name for name, kind in POLICIES.items() if kind.has_budget}
    shared = {name.removeprefix("adakv:") for name in METHODS if name.startswith("adakv:")}
    assert shared == {name for name, kind in POLICIES.items() if kind.compares_heads}


def test_reports_know_every_learned_policy():
    assert set(LEARNED) == {name for name, kind in POLICIES.items() if kind.is_learned}
