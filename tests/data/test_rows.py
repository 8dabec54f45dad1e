"""Objects of JSONL files of pairs, in the forms that others write."""

import pytest

from vspdf.data.rows import pair
from vspdf.errors import UserError


def say(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


FORMS = {
    "ours": ({"context": "a", "completion": "b"}, ("a", ("b",))),
    "several": ({"context": "a", "completion": ["b", "c"]}, ("a", ("b", "c"))),
    "no answer": ({"context": "a"}, ("a", ())),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, ("a", ("b",))),
    "prompt and response": ({"prompt": "a", "response": "b", "id": 7}, ("a", ("b",))),
    "instruction": ({"instruction": "a", "input": "", "output": "b"}, ("a", ("b",))),
    "instruction and input": ({"instruction": "a", "input": "i", "output": "b"}, ("a\ni", ("b",))),
    "question": ({"question": "a", "answer": "b"}, ("a", ("b",))),
    "messages": (say(("user", "a"), ("assistant", "b")), ("a", ("b",))),
    "with a system's": (say(("system", "s"), ("user", "a"), ("assistant", "b")), ("s\na", ("b",))),
    "several turns": (
        say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        ("user: a\nassistant: b\nuser: c", ("d",)),
    ),
    "nothing answered": (say(("user", "a")), ("a", ())),
    "in parts": (say(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])), ("ab", ())),
}


@pytest.mark.parametrize("row, expected", FORMS.values(), ids=FORMS)
def test_forms(row, expected):
    assert pair(row, "line 1") == expected


REFUSED = {
    "two contexts": ({"prompt": "a", "context": "b"}, "both 'context' and 'prompt'; expected one of them"),
    "two answers": ({"prompt": "a", "response": "b", "completion": "c"}, "both 'completion' and 'response'"),
    "messages and answer": ({**say(("user", "a")), "completion": "b"}, "both 'messages' and 'completion'"),
    "no text": ({"prompt": 3, "completion": "b"}, "'prompt' is int, expected text"),
    "no answers": ({"prompt": "a", "response": {"text": "b"}}, "'response' must be a text or a list of texts"),
    "no list": ({"messages": "a"}, "'messages' must be a list of objects with 'role' and 'content'"),
    "no message": ({"messages": ["a"]}, "expected an object with 'role'"),
    "an image": (say(("user", [{"type": "image_url"}])), "has content that is no text"),
    "a tool": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls a tool"),
    "none of it": ({"chosen": "a", "rejected": "b"}, "expected an object with 'context'. Known: chosen, rejected"),
    "a list": (["a", "b"], "not \\['a', 'b'\\]"),
}


@pytest.mark.parametrize("row, message", REFUSED.values(), ids=REFUSED)
def test_what_is_none(row, message):
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        pair(row, "line 1")
