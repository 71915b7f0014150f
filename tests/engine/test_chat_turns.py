"""A second turn of a chat: the cache then holds what the template makes of the whole conversation."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
from cases import TINY
from flax import nnx
from tiny_tokenizers import CHATML, byte_level, sentence_piece, spelled

from dms_jax.config import ModelConfig
from dms_jax.core.cache_base import TokenHistory
from dms_jax.engine.chat import Conversation
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.engine.prompts import NOT_ENDED, next_turn
from dms_jax.engine.session import Session

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + BEFORE_END + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('user' if m['role'] == 'user' else 'model') + '\n' + "
    "m['content'] + '\n<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
THINKING = CHATML.replace("m['content']", "(m['content'].split('</think>')[-1] if not loop.last else m['content'])")
TOKENIZERS = {
    "chatml": lambda f: byte_level(f, chat_template=CHATML),
    "llama2, a space before the end": lambda f: sentence_piece(f, chat_template=LLAMA2.replace("BEFORE_END", "' '")),
    "llama2, a break before the end": lambda f: sentence_piece(f, chat_template=LLAMA2.replace("BEFORE_END", "'\\n'")),
    "llama2, nothing before the end": lambda f: sentence_piece(f, chat_template=LLAMA2.replace("BEFORE_END", "''")),
    "llama3": lambda f: byte_level(
        f, ("<|b|>", "<|h|>", "<|/h|>", "<|eot|>"), bos_token="<|b|>", add_bos=True, chat_template=LLAMA3
    ),
    "gemma": lambda f: byte_level(f, ("<bos>", "<turn>", "<end>"), bos_token="<bos>", chat_template=GEMMA),
    "thoughts are dropped": lambda f: byte_level(f, chat_template=THINKING),
}


class Model:
    config: ModelConfig = replace(TINY, vocab_size=1000)
    embed = nnx.Param(np.zeros((1, 1), np.float32))  # whose dtype is that of its cache


class Report:
    def add(self, *_, **__):
        pass


class Cache:
    """A cache that remembers the ids of its row."""

    def __init__(self, ids=(), history: TokenHistory | None = None):
        self.ids, self.history, self.seen = list(map(int, ids)), history, np.array([len(ids)])


class Scripted(Session):
    """A session whose model gives one answer after the other: ids, and how the answer ended."""

    def generate(self, rows, config, cache=None, *, first=0, show=None, cancelled=None):
        tokens, reason = self.answers.pop(0)
        assert not config.append_stop_id
        held = tokens[:-1] if reason == "stop_id" else tokens
        self.reads.append((cache, list(rows[0])))
        cache = Cache([*(cache.ids if cache is not None else []), *rows[0], *held])
        return argparse.Namespace(tokens=[np.array(tokens, np.int32)], finish_reasons=[reason], cache=cache)


def conversation(tokenizer, answers, loaded=None, **options) -> Conversation:
    options = {"system": None, "as_chat": False, "allow_control_tokens": False, "seed": 0} | options
    config = GenerationConfig(stop_ids=(tokenizer.eos_id,))
    session = Scripted(argparse.Namespace(**options), config, Model(), tokenizer, loaded, Report(), {})
    object.__setattr__(session, "answers", list(answers))
    object.__setattr__(session, "reads", [])
    return Conversation(session)


def user(text):
    return {"role": "user", "content": text}


def answered(text):
    return {"role": "assistant", "content": text}


def answer_ids(tokenizer, text):
    """Return the ids that a model generates for an answer; one of Llama 2 begins with a space."""
    space = " " if tokenizer.eos_id == 2 else ""
    inside, empty = (tokenizer.encode("x" + t).tolist() for t in (space + text, ""))
    return inside[len(empty) :]


@pytest.mark.parametrize("ending", ["stop_id", "length"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_turn_continues_as_if_the_conversation_were_one_prompt(tmp_path, capsys, name, ending):
    tokenizer = TOKENIZERS[name](tmp_path)
    first, second = "yo.", "<think>so</think>ok"
    end = [tokenizer.eos_id] if ending == "stop_id" else []
    talk = conversation(tokenizer, [([*answer_ids(tokenizer, text), *end], ending) for text in (first, second, "bye")])
    said = [user("hi"), answered(first), user("and?"), answered(second), user("so?")]
    for turn, line in enumerate(("hi", "and?", "so?")):
        talk.say(line)
        whole = tokenizer.encode_chat(said[: 2 * turn + 1], reply=True)
        cache, read = talk.session.reads[-1]
        held = [*(cache.ids if cache else []), *map(int, read)]
        assert spelled(tokenizer, held) == spelled(tokenizer, whole)
        dropped = turn == 2 and name == "thoughts are dropped"
        assert (cache is None) == (turn == 0 or dropped), "no token is read twice, unless an earlier turn changes"
    out, err = capsys.readouterr()
    assert out == "yo.\n<think>so</think>ok\nbye\n"
    assert ("read again" in err) == (name == "thoughts are dropped")


def test_answer_keeps_the_ids_that_the_model_chose(tmp_path):
    """A model may spell "he" with two ids, where the tokenizer has one."""
    tokenizer = byte_level(tmp_path, merges=[("h", "e")], chat_template=CHATML)
    h, e, he = (tokenizer.encode(text)[0] for text in ("h", "e", "he"))
    talk = conversation(tokenizer, [([h, e, tokenizer.eos_id], "stop_id"), ([he], "length")])
    talk.say("hi"), talk.say("and?")
    cache, read = talk.session.reads[-1]
    text = tokenizer.chat_text([user("hi"), answered("he"), user("and?")], reply=True)
    assert tokenizer.decode([*cache.ids, *read], skip_special_tokens=False) == text
    assert cache.ids[-2:] == [h, e]


def test_stop_string_is_no_part_of_the_conversation(tmp_path, capsys):
    tokenizer = byte_level(tmp_path, chat_template=CHATML)
    talk = conversation(tokenizer, [(tokenizer.encode("yo END").tolist(), "stop_string"), ([5], "length")])
    object.__setattr__(talk.session, "config", replace(talk.session.config, stop_strings=(" END",)))
    talk.say("hi"), talk.say("and?")
    cache, read = talk.session.reads[-1]
    assert cache is None
    assert list(read) == tokenizer.encode_chat([user("hi"), answered("yo"), user("and?")], reply=True).tolist()
    assert capsys.readouterr().out.startswith("yo\n")


@pytest.mark.parametrize("name", ["chatml", "llama2, a space before the end", "gemma"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
def test_loaded_conversation_is_continued_to_its_end_and_beyond(tmp_path, name, ended):
    tokenizer = TOKENIZERS[name](tmp_path)
    end = [tokenizer.eos_id] if ended else []
    before = [*tokenizer.encode_chat([user("hi")], reply=True).tolist(), *answer_ids(tokenizer, "yo"), *end]
    loaded = Cache(before, TokenHistory((np.unique(before),), (before[-1],)))
    talk = conversation(tokenizer, [(answer_ids(tokenizer, text), "length") for text in ("ok", "bye")], loaded)
    talk.say("and?"), talk.say("so?")
    cache, read = talk.session.reads[-1]
    said = [user("hi"), answered("yo"), user("and?"), answered("ok"), user("so?")]
    want, got = spelled(tokenizer, tokenizer.encode_chat(said, reply=True)), spelled(tokenizer, [*cache.ids, *read])
    if ended:  # what the template puts in front of the end comes too late
        want = want.replace("yo▁</s>", "yo</s>", 1).replace("yoĊ<end>", "yo<end>", 1)
    assert got == want
    talk.reset()
    assert talk.cache is None
    talk.session.answers.append(([5], "length"))
    talk.say("hi")
    assert talk.session.reads[-1][1] == tokenizer.encode_chat([user("hi")], reply=True).tolist()


def test_next_turn_needs_a_template_that_repeats_answers(tmp_path):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer = byte_level(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match="must repeat earlier answers .* start a new conversation"):
        next_turn(tokenizer, None, [user("hi")], NOT_ENDED)


def test_answer_without_finite_logits_changes_nothing(tmp_path):
    tokenizer = byte_level(tmp_path, chat_template=CHATML)
    talk = conversation(tokenizer, [([5], "non_finite"), ([6], "length")])
    with pytest.raises(ValueError, match="this answer: .*not finite"):
        talk.say("hi")
    talk.say("hi")
    assert talk.session.reads[0] == talk.session.reads[1]
