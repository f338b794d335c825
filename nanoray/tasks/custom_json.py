"""Conversations of one's own: a JSON-lines file."""

from __future__ import annotations

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.base import TrainingTask
from nanoray.tasks.files import Row, open_rows
from nanoray.tokenizer import Conversation
from nanoray.tokenizer.conversation import check_conversation


class CustomJSON(TrainingTask):
    """A conversation a line: a list of messages, or ``{"messages": [...]}``.

    A message is ``{"role": ..., "content": ...}``; user and assistant take turns, after a system
    message or without one.

    Args:
        uri: path or URI of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        NanorayError: there is no such file; `example`, for what is no conversation.
    """

    def __init__(self, uri: str) -> None:
        uri = storage.normalize(uri)
        self._rows = open_rows(uri)
        super().__init__(uri, len(self._rows))

    def _example(self, number: int) -> Conversation:
        return conversation_of(self._rows[number])


def conversation_of(row: Row) -> Conversation:
    """The conversation that a row is. Raises NanorayError, naming file and line, if it is none."""
    messages = row.value if isinstance(row.value, list) else row.field("messages", list)
    conversation = {"messages": messages}
    with row.named():
        if len(check_conversation(conversation)) < 2:
            raise NanorayError("the conversation has no answer of the assistant")
    return conversation
