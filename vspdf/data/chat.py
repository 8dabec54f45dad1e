"""Conversations as a model was taught to read them: by the chat template of its folder, which is data."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from vspdf.data.rows import Said
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError


def encode(tokenizer: Tokenizer, said: Said, answer: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation up to where the assistant answers, and of the answer with its end, none where it is None.

    Raises
    ------
    UserError
        If the template cannot be read, refuses the conversation, or writes it otherwise once it is answered.
    """
    begun = _rendered(tokenizer, said, ask=True)
    prompt = tokenizer.encode_rendered(begun)
    if answer is None:
        return prompt, np.empty(0, np.int64)
    whole = _rendered(tokenizer, (*said, ("assistant", answer)), ask=False)
    if not whole.startswith(begun):
        raise UserError(
            f"the chat template of {tokenizer.name} writes a conversation otherwise once it is answered: it cannot be "
            "told where the answer begins."
        )
    ids, size = tokenizer.encode_rendered(whole.rstrip("\n")), len(prompt)
    if ids[:size].tolist() == prompt.tolist():
        ids = ids[size:]
    else:  # a token spans both
        ids = tokenizer.encode_rendered(whole[len(begun) :].rstrip("\n"))
    ends = len(ids) and ids[-1] in tokenizer.ends
    return prompt, ids if ends else np.append(ids, tokenizer.end_of_document)


def _rendered(tokenizer: Tokenizer, said: Said, ask: bool) -> str:
    from jinja2 import TemplateError

    assert tokenizer.chat_template is not None
    messages = [{"role": role, "content": content} for role, content in said]
    named = {**tokenizer.named_tokens, "messages": messages, "add_generation_prompt": ask, "tools": None}
    try:
        return _compiled(tokenizer.chat_template).render(named)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template of {tokenizer.name}: {' '.join(str(error).split())}.") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A template, read once for all conversations that it writes."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: what the assistant says, marked so that others learn it alone; written as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _refuse(message: str) -> Any:
    raise ValueError(message)
