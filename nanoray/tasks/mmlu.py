"""MMLU (Hendrycks et al. 2021): multiple-choice questions of 57 subjects."""

from __future__ import annotations

from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tasks.files import Row
from nanoray.tasks.multiple_choice import MultipleChoiceTask, multiple_choice
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tokenizer import Conversation

Split = Literal["train", "validation", "dev", "test"]

# The hub has the training questions (of other sets, see the paper) as a config of its own. Where
# they cannot be had, OpenBookQA and CommonsenseQA in the same columns stand in for them.
_TRAIN = HubSplit(
    "cais/mmlu", "auxiliary_train", "train", ("auxiliary_train", "aux_train_obqa_csqa")
)


class MMLU(MultipleChoiceTask):
    """One split, all subjects.

    Args:
        data_dir: folder with ``test.parquet`` and the like; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; `example`, for a row that breaks MMLU's form.
    """

    baseline = 0.25

    def __init__(self, split: Split, data_dir: str | None = None) -> None:
        source = HubSplit("cais/mmlu", "all", split, (split,)) if split != "train" else _TRAIN
        self._rows = load_rows(source, data_dir)
        super().__init__("mmlu", len(self._rows))

    def _example(self, number: int) -> Conversation:
        row = self._rows[number]
        if isinstance(row.value, dict) and "train" in row.value:  # so the hub wraps auxiliary_train
            row = Row(row.value["train"], row.where)
        question, answer = row.field("question", str), row.field("answer", int)
        choices = row.texts("choices")
        if not 0 <= answer < len(choices):
            raise NanorayError(
                f"{row.where}: the answer {answer} is none of the {len(choices)} choices, which "
                f"are counted from 0"
            )
        with row.named():
            conversation = multiple_choice(question, choices, answer)
        return {**conversation, "subject": row.field("subject", str)}
