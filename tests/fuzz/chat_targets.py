"""Chats in the shapes in which people keep them."""

import json
import random
from pathlib import Path
from typing import Any

from fuzz import oracles
from fuzz.fuzz_case import Target
from fuzz.mutations import damage, replace_file, rewrite

from dms_jax.chat_records import Keys
from dms_jax.training.data.documents import read_documents

CHATS, KEYS = "chats.json", Keys("text", "messages")
CHAT = [{"role": "user", "content": "one and one?"}, {"role": "assistant", "content": "two"}]
CHAT_RECORDS = [
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "clock"}}], "text": ""},
    {"conversations": [{"from": "human", "value": "été?"}, {"from": "gpt", "value": "été 🙂"}]},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "one and ", "completion": "one"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}]},
]


def make_chats(folder: Path) -> None:
    (folder / CHATS).write_text(json.dumps(CHAT_RECORDS, indent=1))


def read_chats(folder: Path) -> Any:
    found = [document for _, document in read_documents(str(folder / CHATS), KEYS)]
    return [[list(chat), chat.tools] if isinstance(chat, list) else [chat, None] for chat in found]


def mutate_chats(rng: random.Random, folder: Path) -> str:
    """Damage the bytes, or replace one value somewhere inside a record."""
    if rng.random() < 0.5:
        path = folder / CHATS
        return replace_file(rng, path) if rng.random() < 0.1 else rewrite(path, lambda data: damage(rng, data))
    records = json.loads((folder / CHATS).read_text())
    inside = [
        item for record in records for item in (record, *sum((v for v in record.values() if isinstance(v, list)), []))
    ]
    item = rng.choice(inside)
    key, value = (
        rng.choice(list(item)),
        rng.choice([None, "", 3, [], {}, "\ud800", "a\0", [{"type": "image"}], "human"]),
    )
    item[key] = value
    (folder / CHATS).write_text(json.dumps(records))
    return f"{key} becomes {value!r}"


def meant_chats(folder: Path) -> Any:
    """The documents of records in the four shapes of CHAT_RECORDS."""
    records = oracles.strict_json((folder / CHATS).read_bytes())
    json.dumps(records, ensure_ascii=False).encode()
    return [
        [meant_chat(record), record.get("tools") or None]
        for record in ([records] if isinstance(records, dict) else records)
    ]


def meant_chat(record: dict) -> Any:
    if (record.get("text") or "").strip():
        return record["text"]
    for key in ("messages", "conversations"):
        if record.get(key) not in (None, ""):
            return [meant_message(message) for message in record[key]]
    if record.get("prompt") is not None and record.get("completion") is not None:
        halves = record["prompt"], record["completion"]
        if all(isinstance(half, str) for half in halves):
            assert not record.get("tools")
            return halves[0] + halves[1]
        return [meant_message(message) for half in halves for message in half]
    return record["text"] if record.get("text") is not None else {"": ""}[record["messages"]]


def meant_message(message: dict) -> dict:
    if "role" not in message:
        names = {"human": "user", "gpt": "assistant"}
        return {"role": names[message["from"]], "content": meant_content(message["value"])}
    found = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in found:
        assert all(isinstance(call, dict) for call in found["tool_calls"])
        found = {"content": "", **found}
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    assert isinstance(found["role"], str)
    return found | {"content": meant_content(found["content"])}


def meant_content(content: Any) -> str:
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    assert "\0" not in text
    return text


TARGETS = [Target("chats", 120, make_chats, mutate_chats, read_chats, meant_chats)]
