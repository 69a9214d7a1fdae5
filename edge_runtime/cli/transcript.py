"""A conversation as a JSON file: a list of messages, the system message first if there is one.

[{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"},
 {"role": "assistant", "content": "Hello!"}]
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import strict_json
from edge_runtime.errors import ConfigError
from edge_runtime.user_folders import data_folder

if TYPE_CHECKING:
    from edge_runtime.text.chat_template import Message


def path_of(name: str) -> Path:
    """Return the path that somebody typed.

    Raises:
        ConfigError: No file can have it: a home that nobody has, or a name that is too long.
    """
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"`{name:.90}` is no file name: {reason}", "name another file") from error
    return path


def file_of_chat(name: str) -> Path:
    """Return the file of a chat that has a name.

    Raises:
        ConfigError: It is no name.
    """
    if not re.fullmatch(r"\w[\w .-]{0,99}", name):
        raise ConfigError(
            f"the chat's name is {name!r:.60}, expected letters, digits, spaces, dots and dashes",
            "for example: --resume travel",
        )
    return data_folder() / "chats" / f"{name}.json"


def write_transcript(path: Path, messages: list[Message]) -> None:
    """Write a conversation, whole or not at all; a link stays one, and the file that it names is written.

    Raises:
        ConfigError: The file cannot be written.
    """
    place = path.resolve()
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(strict_json.dumps(messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write `{path}`: {error.strerror}", "name another file") from error


def read_transcript(path: Path) -> list[Message]:
    """Return a conversation: perhaps a system message, then questions and answers in turn, an answer last.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read `{path}`: {error.strerror}", "name a file that /save wrote") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` is no JSON file: {error}", "name a file that /save wrote") from error
    messages = content if isinstance(content, list) else [content]
    has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for index, message in enumerate(messages):
        _check(
            path,
            index,
            message,
            "system" if has_system and not index else ("user", "assistant")[(index - has_system) % 2],
        )
    if (len(messages) - has_system) % 2:
        raise ConfigError(f"`{path}` ends with a question that has no answer", "remove the last message from the file")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check(path: Path, index: int, message: Any, role: str) -> None:
    """Refuse a message that is not of this role, or has anything but text as its content."""
    if (
        not isinstance(message, dict)
        or message.keys() != {"role", "content"}
        or not isinstance(message["content"], str)
    ):
        told = f"message {index + 1} of `{path}` is {message!r:.60}, expected a role and a text as content"
        raise ConfigError(told, "name a file that /save wrote")
    if message["role"] != role:
        told = f"message {index + 1} of `{path}` has role {message['role']!r:.60}, expected {role!r}"
        raise ConfigError(told, "questions (`user`) and answers (`assistant`) must alternate")
    if any("\ud800" <= character <= "\udfff" for character in message["content"]):
        told = f"message {index + 1} of `{path}` holds half a character, expected Unicode text"
        raise ConfigError(told, "name a file that /save wrote")
