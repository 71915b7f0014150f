"""Where a row ends: at the stop ids of model and tokenizer, at special tokens, and at logits that are not finite."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_model
from tiny_tokenizers import byte_level

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.engine import decode_loop
from dms_jax.engine.stop_ids import end_ids, split_stops
from dms_jax.errors import ConfigError

CONFIG = dms_jax.GenerationConfig(max_new_tokens=12, stop_ids=())
PROMPTS = [[3, 9, 27], [50, 53, 62, 89]]


def model():
    return tiny_model(DMSConfig(window_size=3, evict_logit_bias=0.0), 3, num_layers=1)


@functools.cache
def free() -> list[list[int]]:
    return [tokens.tolist() for tokens in dms_jax.generate(model(), PROMPTS, CONFIG).tokens]


def broken_at(token: int, value: float):
    """A model that gives no usable logits after `token`."""
    broken = model()
    broken.embed[...] = broken.embed[...].at[token].set(value)
    return broken


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 5}, {"repetition_penalty": 1.5}])
def test_row_ends_where_its_logits_are_not_finite(value, sampling):
    config = replace(CONFIG, **sampling)
    whole = dms_jax.generate(model(), PROMPTS, config).tokens
    token = next(int(t) for t in whole[0][3:] if t not in whole[0][:3] and t not in [*whole[1], *sum(PROMPTS, [])])
    number = whole[0].tolist().index(token) + 1
    warm = decode_loop.num_loop_compilations()
    out = dms_jax.generate(broken_at(token, value), PROMPTS, config)
    assert decode_loop.num_loop_compilations() == warm
    assert out.finish_reasons == ["non_finite", "length"]
    assert out.tokens[0].tolist() == whole[0][:number].tolist()
    np.testing.assert_array_equal(out.tokens[1], whole[1])  # a row does not depend on its neighbors
    assert int(out.cache.seen[0]) == len(PROMPTS[0]) + number


def test_prompt_without_finite_logits_gives_no_token():
    out = dms_jax.generate(broken_at(27, jnp.nan), PROMPTS, CONFIG)
    assert out.finish_reasons == ["non_finite", "length"] and out.tokens[0].size == 0
    assert out.tokens[1].tolist() == free()[1]


def test_stop_at_the_last_finite_token_is_a_stop():
    token = free()[0][3]
    number = free()[0].index(token) + 1
    for fields, reason in (({"stop_ids": (token,)}, "stop_id"), ({"max_new_tokens": number}, "length")):
        out = dms_jax.generate(broken_at(token, jnp.nan), PROMPTS[:1], replace(CONFIG, **fields))
        assert out.finish_reasons == [reason] and out.tokens[0].tolist() == free()[0][:number]


class Ends:
    """A tokenizer of which the model knows the end of text, or not."""

    def __init__(self, eos_id, **special):
        self.eos_id, self.special_ids = eos_id, {f"<{name}>": id_ for name, id_ in special.items()}

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "want"),
    [((7,), 5, (7, 5)), ((7, 5), 5, (7, 5)), ((), 5, (5,)), ((7,), None, (7,)), ((), None, ()), ((7,), 97, (7,))],
)
def test_end_of_text_is_the_union(of_model, of_tokenizer, want):
    config = replace(model().config, eos_token_ids=of_model)
    assert end_ids(config, Ends(of_tokenizer)) == want
    assert end_ids(config, None) == of_model


def test_tokenizer_and_special_stop_strings_end_a_row_by_id():
    token = free()[0][3]
    number = free()[0].index(token) + 1
    for fields, tokenizer in (
        ({"stop_ids": None}, Ends(token)),
        ({"stop_strings": ("<end>", "no such text")}, Ends(None, end=token)),
    ):
        out = dms_jax.generate(model(), PROMPTS[:1], replace(CONFIG, **fields), tokenizer=tokenizer)
        assert out.finish_reasons == ["stop_id"] and out.tokens[0].tolist() == free()[0][:number]
    ignored = dms_jax.generate(model(), PROMPTS[:1], CONFIG, tokenizer=Ends(token))  # stop_ids=()
    assert ignored.tokens[0].tolist() == free()[0]


def test_special_tokens_of_a_real_tokenizer_are_found(tmp_path):
    tokenizer = byte_level(tmp_path)
    end = tokenizer.inner.convert_tokens_to_ids("<|im_end|>")
    assert split_stops(("a", "<|im_end|>", "\n"), tokenizer) == ((end,), ("a", "\n"))
    with pytest.raises(ConfigError, match="contains the special token"):
        split_stops(("<|im_end|>\n",), tokenizer)


@pytest.mark.parametrize("ids", [[[97]], [[-1]], [[1, 2], [3, 300]], [[1.5]]])
@pytest.mark.parametrize("method", ["dense", "hard"])
def test_model_refuses_ids_outside_its_vocabulary(ids, method):
    for given in (np.array(ids), jnp.asarray(ids)):
        with pytest.raises(ConfigError, match=r"token id .* \(0 to 96\)|whole numbers, got 1.5"):
            getattr(model(), method)(given)
