"""Text of single bytes: a character that is cut leaves the characters before it whole."""

import pytest
from tiny_tokenizers import byte_level, sentence_piece

from dms_jax.engine.text_stream import TextStream


@pytest.mark.parametrize("kind", [sentence_piece, byte_level])
@pytest.mark.parametrize(
    ("text", "cut", "want"),
    [
        ("Hi\n\U0001f642", 1, "Hi\n\ufffd"),
        ("Hi\n\n\U0001f642\U0001f642", 2, "Hi\n\n\U0001f642\ufffd"),
        ("\u65e5\u672c", 1, "\u65e5\ufffd"),
        ("\u65e5\u672c", 2, "\u65e5\ufffd"),
        ("a b\U0001f642 c", 0, "a b\U0001f642 c"),
        ("\ufffd\n", 0, "\ufffd\n"),
    ],
)
def test_cut_character_leaves_those_before_it_whole(tmp_path, kind, text, cut, want):
    tokenizer = kind(tmp_path)
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - cut]
    assert tokenizer.decode(ids) == want
    for step in (1, 3):  # what is streamed is that text, however many tokens come at once
        stream = TextStream(tokenizer.decode)
        pieces = [stream.push(ids[:number]) for number in range(step, len(ids) + 1, step)]
        assert "".join(pieces) + stream.push(ids, last=True) == want


def test_bytes_between_other_tokens_and_control_tokens(tmp_path):
    tokenizer = sentence_piece(tmp_path)
    day = tokenizer.encode("x\u65e5")[-3:].tolist()
    ids = [1, *tokenizer.encode("a b").tolist(), *day, *day[:2], *tokenizer.encode("xc")[-1:].tolist(), 2, *day]
    assert tokenizer.decode(ids) == "a b\u65e5\ufffdc\u65e5"
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<s>ab\u65e5\ufffdc</s>\u65e5"
