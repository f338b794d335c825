"""Conversations to token ids and a loss mask, and a coloured view of both.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`: user and assistant take
turns, the user begins; a leading system message is merged into the first user message (after
nanochat). A user's content is a string. An assistant's is a string or a list of parts
`{"type": "text" | "python" | "python_output", "text": ...}`.

Trained on (mask 1) is what the assistant must produce itself: its text, its calculator calls
with their two marks, and `<|assistant_end|>`. Everything else, the calculator's output with its
marks included, has mask 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanoray.errors import NanorayError

if TYPE_CHECKING:
    from rich.text import Text

    from nanoray.tokenizer.base import Tokenizer

Conversation = Mapping[str, Any]

# Part type -> (mark before, mark after, mask).
_PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids and mask of a whole conversation, both of the same length."""
    return _render_messages(tokenizer, check_conversation(conversation))


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of the conversation without a last assistant message, then `<|assistant_start|>`."""
    messages = check_conversation(conversation)
    if messages[-1][0] == "assistant":
        messages = messages[:-1]
    ids, _ = _render_messages(tokenizer, messages)
    return [*ids, tokenizer.special_id("<|assistant_start|>")]


def check_conversation(
    conversation: Conversation,
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Validate, and normalise to [(role, [(part type, text), ...]), ...] without a system role.

    Raises:
        NanorayError: what is wrong, and in which message and part (counted from 0).
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise NanorayError('a conversation must be {"messages": [...]} with at least one message')
    checked: list[tuple[str, list[tuple[str, str]]]] = []
    system = ""
    for index, message in enumerate(messages):
        where = f"conversation message {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise NanorayError(f'{where} must be {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if index == 0 and role == "system":
            if not isinstance(content, str):
                raise NanorayError(f"{where}: the content of a system message must be a string")
            system = content + "\n\n"
            continue
        expected = "assistant" if len(checked) % 2 else "user"
        if role != expected:
            raise NanorayError(f"{where} is from {role!r}, but it is {expected}'s turn")
        if role == "user":
            if not isinstance(content, str):
                raise NanorayError(f"{where}: the content of a user message must be a string")
            checked.append((role, [("text", system + content)]))
            system = ""
        else:
            checked.append((role, list(_check_parts(content, where))))
    if not checked:
        raise NanorayError("the conversation has a system message, but no user message after it")
    return checked


def _check_parts(content: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield "text", content
        return
    if not isinstance(content, Sequence):
        raise NanorayError(
            f"{where}: the content of an assistant message must be a string or a list of parts, "
            f"not {type(content).__name__}"
        )
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or str(part.get("type")) not in _PARTS:
            raise NanorayError(
                f'{where}, part {index} must be {{"type": ..., "text": ...}} with a type of '
                f"{', '.join(_PARTS)}"
            )
        if not isinstance(part.get("text"), str):
            raise NanorayError(f"{where}, part {index}: its text must be a string")
        yield part["type"], part["text"]


def _render_messages(
    tokenizer: Tokenizer, messages: list[tuple[str, list[tuple[str, str]]]]
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    def mark(name: str | None, trained: int) -> None:
        if name is not None:
            add([tokenizer.special_id(name)], trained)

    mark("<|bos|>", 0)
    for role, parts in messages:
        by_assistant = int(role == "assistant")
        mark(f"<|{role}_start|>", 0)
        for part_type, text in parts:
            before, after, trained = _PARTS[part_type]
            mark(before, trained)
            add(tokenizer.encode(text), trained * by_assistant)
            mark(after, trained)
        mark(f"<|{role}_end|>", by_assistant)
    return ids, mask


def visualize(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int] | None) -> Text:
    """See `Tokenizer.visualize`."""
    from rich.text import Text

    specials = set(tokenizer.special_tokens.values())
    view = Text()
    for index, token in enumerate(ids):
        piece = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
        if mask is not None:
            colour = "green" if mask[index] else "red"
        else:
            colour = ("cyan", "blue")[index % 2]
        shown = piece.replace("\n", "\\n\n")  # the mark, then the break itself
        view.append(shown, style=f"bold {colour}" if token in specials else colour)
        view.append("|", style="dim")
    return view
