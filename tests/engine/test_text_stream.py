"""Text of tokens that arrive a few at a time, and stop strings."""

import numpy as np

from dms_jax.engine.text_stream import TextStream, trim_at_stop


def test_stream_shows_whole_characters_only():
    folder_text = "a😀b\ufffd😀"
    ids = np.frombuffer(folder_text.encode(), np.uint8)
    decode = lambda part: bytes(bytearray(part)).decode("utf-8", "replace")
    for step in (1, 2, 3):
        stream, pieces = TextStream(decode), []
        for n in range(step, len(ids) + step, step):
            pieces.append(stream.push(ids[:n]))
            assert folder_text.startswith("".join(pieces))
        pieces.append(stream.push(ids, last=True))
        assert "".join(pieces) == folder_text
    torn = TextStream(decode)
    assert torn.push(ids[:1]) == "a" and torn.push(ids[:3]) == "" and torn.push(ids[:3], last=True) == decode(ids[1:3])


def test_stream_holds_back_a_possible_stop_text():
    decode = "".join
    stream = TextStream(decode, ("END", "\n\n"))
    assert [stream.push(list("one E"[:n])) for n in range(1, 6)] == ["o", "n", "e", " ", ""]
    assert stream.push(list("one ExENDtwo")) == "Ex" and stream.push(list("one ExENDtwo more"), last=True) == ""
    free = TextStream(decode, ("END",))
    assert free.push(list("EN")) == "" and free.push(list("EN"), last=True) == "EN"


def test_text_is_trimmed_at_the_first_stop_string():
    assert trim_at_stop("one END two STOP", ("STOP", "END")) == "one " and trim_at_stop("one", ("END",)) == "one"
