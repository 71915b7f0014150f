"""Read the shapes in which people keep text and chats in records. Every other shape is refused, with how to convert it.

    {"text": "..."}                                                        a text
    {"messages": [{"role": "user", "content": "hi"}, ...], "tools": [...]}   a chat
    {"conversations": [{"from": "human", "value": "hi"}, ...]}               a chat in the format of ShareGPT
    {"prompt": ..., "completion": ...}                                     the two halves of a text or of a chat

The `content` of a message may be a list of text parts, or null beside `tool_calls`. `messages` and `tools` may be JSON
in a string, as in tables. Begin with `document_of`.
"""

from typing import Any, NamedTuple

from dms_jax.errors import ConfigError, shown
from dms_jax.files import parse_json

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
CONVERSATIONS = "conversations"
PROMPT_KEYS = ("prompt", "messages", CONVERSATIONS)
DOCUMENT_KEYS = (CONVERSATIONS, "prompt")  # beside those of `Keys`
UNREAD_KEYS = {  # of a chat; they would change its text
    "functions": 'write them as "tools": [{"type": "function", "function": ...}, ...]',
    "chat_template_kwargs": "apply the chat template yourself and give the result as text",
}
RECORD_KEYS = (*DOCUMENT_KEYS, "completion", "tools", "system", *UNREAD_KEYS)  # all that decide about a document
ALPACA = (
    '; convert it to {"messages": [{"role": "user", "content": the instruction and the input}, '
    '{"role": "assistant", "content": the output}]}'
)


class Keys(NamedTuple):
    """The keys under which a record may hold its document. The first key that a record has is used."""

    text: str
    messages: str

    def __str__(self) -> str:
        return f"{self.text!r} or {self.messages!r} (set data.text_key or data.messages_key)"


class Chat(list):
    """The messages of a chat, `{"role": ..., "content": ...}` with text as content, and the tools that they may use."""

    def __init__(self, messages: list[dict], tools: list[dict] | None = None):
        super().__init__(messages)
        self.tools = tools


def document_of(record: object, where: str, keys: Keys) -> str | Chat:
    """Return the text or the chat of a training record. "" stands for an empty document."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: record must be an object with {keys}, got {shown(record)}")
    text = record.get(keys.text)
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{where}: {keys.text!r} must be a string, got {shown(text)}")
    if text and text.strip():
        return _clean(text, where, keys.text)
    for key in (keys.messages, CONVERSATIONS):
        if record.get(key) not in (None, ""):
            return _chat(record, key, where)
    if record.get("prompt") is not None and record.get("completion") is not None:
        return _pair(record, where)
    if text is not None or record.get(keys.messages) == "":
        return text or ""
    if nulls := [key for key in (*keys, CONVERSATIONS) if key in record]:
        raise ConfigError(f"{where}: {nulls[0]!r} must be a string or a list of messages, got null")
    found = ", ".join(map(repr, record)) or "an empty object"
    hint = ALPACA if {"instruction", "output"} <= record.keys() else ""
    raise ConfigError(
        f"{where}: record must have a key {keys}, or {CONVERSATIONS!r}, or 'prompt' and 'completion', got {found}{hint}"
    )


def prompt_of(record: object, where: str) -> str | Chat:
    """Return the text or the chat of a record of prompts."""
    found = [key for key in PROMPT_KEYS if record.get(key) is not None] if isinstance(record, dict) else []
    if not isinstance(record, dict) or len(found) != 1:
        raise ConfigError(
            f'{where}: a record must be an object with either "prompt" (text) or "messages" (a chat), '
            f"got {shown(record)}"
        )
    (key,) = found
    if key == "prompt" and not isinstance(record[key], list):
        if not isinstance(record[key], str) or not record[key]:
            raise ConfigError(f'{where}: "prompt" must be non-empty text')
        _refuse_tools(record, where)
        return record[key]
    chat = _chat(record, key, where)
    if not chat:
        raise ConfigError(f"{where}: {key!r} must be a list of at least one message, got an empty one")
    return chat


def _pair(record: dict, where: str) -> str | Chat:
    """Join the two halves of a record, of which a trainer would learn the second only."""
    halves = record["prompt"], record["completion"]
    if all(isinstance(half, str) for half in halves):
        _refuse_tools(record, where)
        return _clean("".join(halves), where, "prompt")
    if not all(isinstance(half, list) for half in halves):
        kinds = " and ".join(type(half).__name__ for half in halves)
        raise ConfigError(f"{where}: 'prompt' and 'completion' must be two texts or two lists of messages, got {kinds}")
    return Chat([*_chat(record, "prompt", where), *_chat(record, "completion", where)], _tools(record, where))


def _chat(record: dict, key: str, where: str) -> Chat:
    value = record[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"{where}: {key!r}")
    shape = f"{where}: {key!r} must be a list of {{'role': str, 'content': str}}"
    if not isinstance(value, list):
        raise ConfigError(f"{shape}, got {shown(value)}")
    messages = [_message(item, f"{shape}: message {number}") for number, item in enumerate(value, start=1)]
    for name, way_out in UNREAD_KEYS.items():
        if record.get(name):
            raise ConfigError(f"{where}: {name!r} cannot be read; {way_out}")
    system = record.get("system")  # beside the messages, as in the formats of ShareGPT and Anthropic
    if system is not None and not isinstance(system, str):
        raise ConfigError(f"{where}: 'system' must be text, got {shown(system)}")
    if key != "completion" and messages and system is not None and system.strip():
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": _clean(system, where, "system")})
        elif messages[0]["content"] != system:
            raise ConfigError(f"{where}: 'system' stands beside another system message; keep one of them")
    return Chat(messages, _tools(record, where))


def _tools(record: dict, where: str) -> list[dict] | None:
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{where}: 'tools'")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{where}: 'tools' must be a list of objects, got {shown(tools)}")
    return tools


def _refuse_tools(record: dict, where: str) -> None:
    for name in ("tools", "system"):
        if record.get(name):
            raise ConfigError(f"{where}: {name!r} needs a chat template, so write the text as 'messages'")


def _message(item: object, where: str) -> dict:
    """Return a message as templates expect it: with text as content, and without keys that are null."""
    if not isinstance(item, dict):
        raise ConfigError(f"{where} is {shown(item)}")
    if "role" not in item and isinstance(item.get("from"), str):  # ShareGPT
        if item["from"] not in SHAREGPT_ROLES:
            raise ConfigError(f"{where} is from {item['from']!r}; known: {', '.join(SHAREGPT_ROLES)}")
        item = {"role": SHAREGPT_ROLES[item["from"]], "content": item.get("value")}
    message = {key: value for key, value in item.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ConfigError(f"{where} has the role {shown(message.get('role'))}")
    if message.get("weight", 1) != 1:
        raise ConfigError(f"{where} has the weight {shown(message['weight'])}; all messages count, so drop the key")
    if message.get("function_call"):
        raise ConfigError(f"{where} has a 'function_call'; write it as 'tool_calls'")
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ConfigError(f"{where} has 'tool_calls' that are not a list of objects")
        message.setdefault("content", "")
        if calls:  # many templates ask only whether the key is there
            message["tool_calls"] = [_call(call) for call in calls]
    message["content"] = _content(message.get("content"), where)
    return message


def _call(call: dict) -> dict:
    """Return a call with its arguments as an object, which templates write as JSON; clients of OpenAI store JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"], "arguments")
    except ConfigError:
        return call  # a text that is no JSON stays as it is
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _content(content: object, where: str) -> str:
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ConfigError(f"{where} has the content {shown(content)}")
    return _clean(content, where, "content")


def _part(part: object, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise ConfigError(f"{where} has a part of type {shown(kind)}; only text can be read, so drop it or the record")
    if not isinstance(part.get("text"), str):
        raise ConfigError(f"{where} has a text part without text: {shown(part)}")
    return part["text"]


def _clean(text: str, where: str, key: str) -> str:
    if "\0" in text:
        raise ConfigError(f"{where}: character {text.index(chr(0))} of {key!r} is NUL; clean the text")
    return text


def without_nulls(value: Any) -> Any:
    """Return the value of a table without the keys that are null: a column has every key that any of its rows has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
