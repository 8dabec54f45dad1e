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
    ids = tokenizer.encode_rendered(whole[len(begun) :].rstrip("\n"))
    ends = len(ids) and ids[-1] == tokenizer.end_of_document
    return prompt, ids if ends else np.append(ids, tokenizer.end_of_document)


def _rendered(tokenizer: Tokenizer, said: Said, ask: bool) -> str:
    from jinja2 import TemplateError

    assert tokenizer.chat_template is not None
    messages = [{"role": role, "content": content} for role, content in said]
    begin = next((token for token in _BEGINS if token in tokenizer.vocabulary), tokenizer.end_token)
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=ask, eos_token=tokenizer.end_token, bos_token=begin, tools=None
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template of {tokenizer.name}: {' '.join(str(error).split())}.") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A template, read once for all conversations that it writes."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>")


def _refuse(message: str) -> Any:
    raise ValueError(message)
