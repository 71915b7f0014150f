"""What a notebook shows: one line for a model, a cache and a mistake, and texts for a generation."""

import jax
import numpy as np
import pytest
from cases import tiny_model, tokens

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError, naming

WINDOW = DMSConfig(window_size=4)


def test_model_is_one_line():
    text = repr(tiny_model(WINDOW))
    assert "\n" not in text and len(text) < 160
    assert all(part in text for part in ("llama", "3 layers x 4 KV heads", "float32", "policy dms"))
    model = tiny_model(None)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert f"{count:,} parameters" in repr(model) and "policy dense" in repr(model) == str(model)


@pytest.mark.parametrize("pages", [True, False])
def test_cache_is_one_line_wherever_its_arrays_are(rng, pages):
    model = tiny_model(WINDOW)
    cache = dms_jax.init_pages(model, 2, 64) if pages else dms_jax.init_cache(model, 2, 64, policy="tova:8")
    _, cache = dms_jax.prefill(model, cache, tokens(rng, 2, 12))
    live, text = float(np.mean(cache.live_counts)), repr(cache)
    for part in ("2 rows", "3 layers x 4 KV heads", f"{live:.4g} of 12 tokens", f"{int(cache.bytes):,} bytes"):
        assert part in text, text
    assert ("LearnedEviction" in text and "pages of" in text) if pages else ("TOVA(8)" in text and "64 slots" in text)
    traced = []
    jax.jit(lambda cache: traced.append(repr(cache)))(cache)
    traced += [repr(jax.eval_shape(lambda cache: cache, cache)), repr(jax.tree.map(lambda x: x.sharding, cache))]
    given = repr(cache)
    _, newer = dms_jax.decode_step(model, cache, np.array([1, 2]), donate=True)
    traced += [given, repr(cache), repr(newer)]
    assert all("\n" not in text and len(text) < 220 for text in traced) and "not known here" in traced[0]
    assert "given to a newer cache" in traced[4] and "of 13 tokens" in traced[5]


def test_generation_shows_texts_and_counts_but_no_arrays_of_the_cache(rng):
    generation = dms_jax.generate(
        tiny_model(None), tokens(rng, 2, 5), dms_jax.GenerationConfig(max_new_tokens=3, stop_ids=())
    )
    assert "cache" not in repr(generation) and "logits" not in repr(generation) and len(repr(generation)) < 800
    assert "6 new tokens" in generation._repr_html_()
    named = dms_jax.engine.generation.replace(generation, texts=["<script>x</script>", "a & b"])
    shown = named._repr_html_()
    assert "&lt;script&gt;" in shown and "a &amp; b" in shown and "<script" not in shown


def test_mistake_is_one_line_in_ipython_even_when_chained():
    with pytest.raises(ConfigError) as caught, naming("file.yaml"):
        raise ConfigError("steps must be at least 1, got 0") from OSError("why")
    shown = caught.value._render_traceback_()
    assert shown == ["ConfigError: file.yaml: steps must be at least 1, got 0"]
    dms_jax.full_tracebacks(True)
    try:
        assert not hasattr(caught.value, "_render_traceback_")  # IPython then shows all frames
    finally:
        dms_jax.full_tracebacks(False)
    assert hasattr(caught.value, "_render_traceback_")


def test_mistake_is_one_line_in_a_real_ipython(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell("import dms_jax; dms_jax.load('no/such/folder')")
    out = "".join(capsys.readouterr())
    assert "no such folder" in out and "Traceback" not in out


def test_errors_of_the_hub_are_quoted_and_not_chained(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match="no route to the hub") as caught:
        dms_jax.load("somebody/something")
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
