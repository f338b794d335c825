"""SmolTalk (Ben Allal et al. 2025): conversations of many kinds, written by larger models."""

from __future__ import annotations

from typing import Literal

from nanoray.tasks.base import TrainingTask
from nanoray.tasks.custom_json import conversation_of
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tokenizer import Conversation

Split = Literal["train", "test"]


class SmolTalk(TrainingTask):
    """A conversation a row: 460 thousand to train, 24 thousand to test.

    Args:
        data_dir: folder with ``train.jsonl`` and ``test.jsonl``; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; `example`, for what is no conversation.
    """

    def __init__(self, split: Split, data_dir: str | None = None) -> None:
        source = HubSplit("HuggingFaceTB/smoltalk", "all", split, (split,))
        self._rows = load_rows(source, data_dir)
        super().__init__("smoltalk", len(self._rows))

    def _example(self, number: int) -> Conversation:
        return conversation_of(self._rows[number])
