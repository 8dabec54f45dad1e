"""What one object of a JSONL file of pairs says: a context, and the texts that would answer it."""

from __future__ import annotations

from typing import Any

from vspdf.errors import UserError, did_you_mean

# Names that others give the two, ours first.
CONTEXTS = ("context", "prompt", "instruction", "question", "messages")
ANSWERS = ("completion", "completions", "response", "output", "answer", "references")
Said = tuple[tuple[str, str], ...]  # role and content of the messages of a conversation


class Conversation(str):
    """A context made of messages, which knows them still, for models that have a way of their own to write them."""

    said: Said

    @classmethod
    def of(cls, context: str, said: Said) -> Conversation:
        """A context and the messages before the answer."""
        found = cls(context)
        found.said = said
        return found


def said_in(context: str) -> Said:
    """The messages that a context is made of; none where it is no conversation."""
    return context.said if isinstance(context, Conversation) else ()


def pair(row: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """Reads context and references from an object.

    ``context``, ``prompt``, ``instruction`` (with ``input``) or ``question``; and ``completion``, ``response``,
    ``output`` or ``answer``, a text or a list of them, or none. Or ``messages``: what the assistant says last is the
    completion, what comes before the context, by ``role: `` where it is more than a system's and a user's; it is a
    `Conversation` then.

    Raises
    ------
    UserError
        If it is no such object, or two of the names are there.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'context' and 'completion', not {_short(row)}.")
    name = _one(CONTEXTS, row, where)
    if name is None:
        raise UserError(f"{where}: expected an object with 'context'.{did_you_mean('context', map(str, row))}")
    answer = _one(ANSWERS, row, where)
    if name == "messages":
        if answer is not None:
            raise UserError(f"{where}: both 'messages' and '{answer}'; expected one of them.")
        return _conversation(row["messages"], where)
    context = text(row, name, where)
    if name == "instruction" and row.get("input"):
        context = f"{context}\n{text(row, 'input', where)}"
    found = row.get(answer, []) if answer else []
    references = [found] if isinstance(found, str) else found
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise UserError(f"{where}: '{answer}' must be a text or a list of texts, not {_short(found)}.")
    return context, tuple(references)


def text(row: Any, key: str, where: str) -> str:
    """Returns the text that an object has under a key.

    Raises
    ------
    UserError
        If it is no object, or has no text there.
    """
    if not isinstance(row, dict) or key not in row:
        near = did_you_mean(key, map(str, row)) if isinstance(row, dict) else ""
        raise UserError(f"{where}: expected an object with '{key}'.{near}")
    if not isinstance(row[key], str):
        raise UserError(f"{where}: '{key}' is {type(row[key]).__name__}, expected text.")
    return row[key]


def _one(names: tuple[str, ...], row: dict[str, Any], where: str) -> str | None:
    found = [name for name in names if name in row]
    if len(found) > 1:
        raise UserError(f"{where}: both '{found[0]}' and '{found[1]}'; expected one of them.")
    return found[0] if found else None


def _conversation(messages: Any, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'.")
    said = [(text(message, "role", where), _content(message, where)) for message in messages]
    answer: tuple[str, ...] = (said.pop()[1],) if said[-1][0] == "assistant" else ()
    if {role for role, _ in said} <= {"system", "user"} and sum(role == "user" for role, _ in said) == 1:
        context = "\n".join(content for _, content in said)
    else:
        context = "\n".join(f"{role}: {content}" for role, content in said)
    return Conversation.of(context, tuple(said)), answer


def _content(message: dict[str, Any], where: str) -> str:
    """Returns a message's text, which may come in parts."""
    parts = message.get("content")
    if message.get("tool_calls") or message.get("function_call"):
        raise UserError(f"{where}: 'messages' calls a tool; expected text alone.")
    if not isinstance(parts, list):
        return text(message, "content", where)
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise UserError(f"{where}: 'messages' has content that is no text.")
    return "".join(text(part, "text", where) for part in parts)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
