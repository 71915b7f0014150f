"""Texts and chats are read in the shapes in which people keep them; every other shape is refused, with the way out."""

import json

import pytest

from dms_jax.chat_records import Keys, document_of, prompt_of, without_nulls
from dms_jax.engine.prompts import read_prompts
from dms_jax.errors import ConfigError

KEYS = Keys("text", "messages")
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"default": None}}}
PART = {"type": "text", "text": "hi"}

CHATS = {
    "messages": ({"messages": [USER, REPLY]}, [USER, REPLY]),
    "messages as JSON": ({"messages": json.dumps([USER, REPLY])}, [USER, REPLY]),
    "empty text beside messages": ({"text": " ", "messages": [USER, REPLY]}, [USER, REPLY]),
    "null text beside messages": ({"text": None, "messages": [USER, REPLY]}, [USER, REPLY]),
    "one text part": ({"messages": [{"role": "user", "content": [PART]}, REPLY]}, [USER, REPLY]),
    "text parts are lines": (
        {"messages": [{"role": "user", "content": [PART, PART | {"text": "you"}]}]},
        [{"role": "user", "content": "hi\nyou"}],
    ),
    "null beside tool_calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "no call at all": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        [USER, {"role": "assistant", "content": ""}],
    ),
    "null keys of a message": ({"messages": [USER | {"name": None, "tool_calls": None}, REPLY]}, [USER, REPLY]),
    "arguments as JSON": (
        {
            "messages": [
                USER,
                REPLY | {"tool_calls": [CALL | {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]},
            ]
        },
        [USER, REPLY | {"tool_calls": [CALL]}],
    ),
    "other keys of a message": ({"messages": [USER | {"reasoning_content": "r", "weight": 1}]}, None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 1}], "id": 7},
        [USER, REPLY],
    ),
    "ShareGPT with a system prompt": (
        {"system": "be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        [{"role": "system", "content": "be brief"}, USER, REPLY],
    ),
    "a system message goes before a system key": (
        {"system": "be brief", "messages": [{"role": "system", "content": "be brief"}, USER]},
        [{"role": "system", "content": "be brief"}, USER],
    ),
    "ShareGPT with tools": (
        {"conversations": [{"from": "observation", "value": "12:00"}, {"from": "system", "value": "s"}]},
        [{"role": "tool", "content": "12:00"}, {"role": "system", "content": "s"}],
    ),
    "roles under conversations": ({"conversations": [USER, REPLY]}, [USER, REPLY]),
    "prompt and completion": ({"prompt": [USER], "completion": [REPLY]}, [USER, REPLY]),
    "prompt beside messages": ({"messages": [USER, REPLY], "prompt": "hi"}, [USER, REPLY]),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_become_messages(name):
    record, messages = CHATS[name]
    found = document_of(record, "here", KEYS)
    assert found == (record["messages"] if messages is None else messages) and found.tools is None


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("shape", [{"messages": [USER, REPLY]}, {"prompt": [USER], "completion": [REPLY]}])
def test_tools_stay_with_their_chat(shape, tools):
    found = document_of(shape | {"tools": tools}, "here", KEYS)
    assert found == [USER, REPLY] and found.tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_the_same_as_none(tools):
    assert document_of({"messages": [USER], "tools": tools}, "here", KEYS).tools is None


@pytest.mark.parametrize(
    "record, text",
    [
        ({"text": "a", "messages": [USER], "tools": [TOOL]}, "a"),  # the rendered chat beside its source
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"text": ""}, ""),
        ({"text": "", "messages": ""}, ""),
    ],
)
def test_texts_stay_texts(record, text):
    assert document_of(record, "here", KEYS) == text


REFUSED = {
    "an image": ({"messages": [{"role": "user", "content": [PART, {"type": "image_url"}]}]}, "message 1.*image_url"),
    "a part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text part without text"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has the content None"),
    "old calls": ({"messages": [REPLY | {"function_call": {"name": "f"}}]}, "'function_call'.*'tool_calls'"),
    "old tools": ({"messages": [USER], "functions": [{"name": "f"}]}, "'functions'.*\"tools\""),
    "options of a template": ({"messages": [USER], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs'.*text"),
    "calls that are none": ({"messages": [REPLY | {"tool_calls": "f()"}]}, "'tool_calls'"),
    "tools that are none": ({"messages": [USER], "tools": ["f"]}, "'tools' must be a list of objects"),
    "damaged JSON": ({"messages": "[{"}, "'messages' is not valid JSON"),
    "a number as role": ({"messages": [{"role": 1, "content": "a"}]}, "message 1 has the role 1"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, "'narrator'; known: human, "),
    "no value": ({"conversations": [{"from": "human"}]}, "message 1 has the content None"),
    "a text and a chat": ({"prompt": "a", "completion": [REPLY]}, "two texts or two lists.*str and list"),
    "two system messages": (
        {"system": "be long", "messages": [{"role": "system", "content": "be brief"}, USER]},
        "'system' stands beside another system message",
    ),
    "a message that must not count": ({"messages": [USER | {"weight": 0}]}, "the weight 0"),
    "tools beside a text": ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "'tools' needs a chat template"),
    "Alpaca": ({"instruction": "add", "input": "1", "output": "2"}, "'text' or 'messages'.*convert.*\"messages\""),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'text' or 'messages'.*'chosen'"),
    "a NUL": ({"messages": [{"role": "user", "content": "a\0"}]}, "character 1 of 'content' is NUL"),
    "a list": ([USER], "must be an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_shapes_are_refused_with_the_way_out(name):
    record, words = REFUSED[name]
    with pytest.raises(ConfigError, match=f"^here: .*{words}") as refusal:
        document_of(record, "here", KEYS)
    assert "\n" not in str(refusal.value)


def test_nulls_of_a_table_are_missing_keys():
    """A column of objects has every key that any of its rows has."""
    row = {"text": None, "messages": [USER | {"name": None}], "tools": [{"function": {"name": "f", "unit": None}}]}
    assert without_nulls(row) == {"messages": [USER], "tools": [{"function": {"name": "f"}}]}


# --- prompts ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_prompts_have_the_shapes_of_training_records(tmp_path, name):
    records = [
        {"prompt": "one", "id": 1},
        {"messages": [USER], "tools": [TOOL]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"prompt": [USER], "completion": [REPLY]},
    ]
    text = json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text)
    prompts = read_prompts(str(tmp_path / name))
    assert [prompt.content for prompt in prompts] == ["one", [USER], [USER], [USER]]
    assert [prompt.record for prompt in prompts] == records
    assert [prompt.tools for prompt in prompts] == [None, [TOOL], None, None]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "messages": [USER]}, "either"),
        ({"text": "a"}, "either"),
        ({"prompt": ""}, "non-empty"),
        ({"prompt": 3}, "non-empty"),
        ({"prompt": []}, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"prompt": "a", "tools": [TOOL]}, "'tools' needs a chat template"),
        ([1], "either"),
    ],
)
def test_records_that_are_no_prompt_are_refused(record, words):
    with pytest.raises(ConfigError, match=f"^here: .*{words}"):
        prompt_of(record, "here")


def test_half_a_character_anywhere_in_a_record_is_refused_before_anything_is_generated(tmp_path):
    """The record is written next to the answer, so half a character beside the prompt would stop the run there."""
    for number, record in enumerate([{"id": "\ud800"}, {"\udfff": 1}, {"a": [{"b": "\ud83d"}]}]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f'{{"prompt": "a"}}\n{json.dumps({"prompt": "a"} | record)}\n')
        with pytest.raises(ConfigError, match=f"{number}.jsonl, line 2 holds half of a surrogate pair"):
            read_prompts(str(path))
    (tmp_path / "whole.jsonl").write_text(json.dumps({"prompt": "🙂", "id": "\\ud800"}))  # an escaped backslash
    assert read_prompts(str(tmp_path / "whole.jsonl"))[0].content == "🙂"


def test_prompt_file_of_another_kind_is_refused_with_how_to_convert_it(tmp_path):
    with pytest.raises(ConfigError, match=r"--prompts must end in \.txt .*a\.csv; convert it.*read_csv"):
        read_prompts("a.csv")
