"""Any Hugging Face causal language model, from a folder or the hub, for CORE and bits per byte."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoray.errors import NanorayError
from nanoray.evals.core_render import Question
from nanoray.evals.core_score import EMPTY_SPAN, SpanScore, padded, pool, token_scores

_UNLIMITED = 1 << 20  # max_len of a model that names no limit
_CPU_LOGITS = 64 * 2**20  # logits of one forward pass
_GPU_LOGITS = 512 * 2**20
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"  # how SentencePiece vocabularies write a space


def load_hf(
    name: str, device: torch.device, dtype: torch.dtype, max_len: int | None = None
) -> HFModel:
    """A model and its tokenizer from a folder or the hub; no code of the repository is run.

    Args:
        name: a folder, or a name on the hub; weights must be safetensors.
        max_len: read at most so many tokens (None: what the model's config says).

    Raises:
        NanorayError: transformers is not installed, or what is there cannot be used.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise NanorayError(
            f"Hugging Face models need the package transformers ({error}); "
            f"pip install 'nanoray[hf]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # of a dozen classes: config, hub, safetensors, missing packages
        cause = str(error).strip().split("\n")[0]
        raise NanorayError(
            f"the Hugging Face model {name} cannot be loaded ({type(error).__name__}: {cause}); "
            f"give a folder with config.json, a tokenizer and safetensors, or a name on the hub"
        ) from error
    return HFModel(model.to(device=device, dtype=dtype).eval(), tokenizer, name, max_len)


class HFModel:
    """A transformers model with its tokenizer: a `LanguageModel` for CORE, and what bits per
    byte needs (`token_losses`, `token_bytes`, and `encode_batch` for packing rows).

    Attributes:
        name: where it came from.
        max_len: the longest row in tokens that it can read.
        bos_id: what rows begin with: its BOS, or else its end-of-text token.
        vocab_size: ids of the tokenizer or of the logits, whichever are more.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_len: int | None = None) -> None:
        self._model, self._tokenizer, self.name = model, tokenizer, name
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or _UNLIMITED
        self.max_len = min(limit, max_len or limit)
        self.vocab_size = max(config.vocab_size, len(tokenizer))
        self.token_dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        begin = tokenizer.bos_token_id
        self.bos_id: int = tokenizer.eos_token_id if begin is None else begin
        if self.bos_id is None:
            raise NanorayError(
                f"the tokenizer of {name} has neither a BOS nor an end-of-text token to begin "
                f"rows with; set bos_token in its tokenizer_config.json"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, each an array [n] of `token_dtype`."""
        return [np.array(self.encode(text), dtype=self.token_dtype) for text in texts]

    @torch.inference_mode()
    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of every target in nats, fp32 [B, T]."""
        logits_BTV = self._model(input_ids=inputs_BT).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"
        )
        return losses.view_as(targets_BT)

    @torch.inference_mode()
    def score(self, questions: Sequence[Question]) -> list[list[SpanScore]]:
        """See `LanguageModel`: whole rows in padded batches of like length."""
        scores = [[EMPTY_SPAN] * len(question.rows) for question in questions]
        # (row, start, question, option); the last token of a row is only a target.
        rows = [
            (row, start, i, option)
            for i, question in enumerate(questions)
            for option, (row, start) in enumerate(zip(question.rows, question.starts))
            if start < len(row)
        ]
        rows.sort(key=lambda entry: len(entry[0]))
        while rows:
            budget = _CPU_LOGITS if self.device.type == "cpu" else _GPU_LOGITS
            size = max(1, budget // (len(rows[-1][0]) * self.vocab_size))
            batch = [rows.pop() for _ in range(min(size, len(rows)))]
            logits_BTV = self._logits([row[:-1] for row, *_ in batch])
            for logits_TV, (row, start, i, option) in zip(logits_BTV, batch):
                span_NV = logits_TV[start - 1 : len(row) - 1].float()
                scores[i][option] = pool(token_scores(span_NV, row[start:]))
        return scores

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Logits [B, T, vocab] in the model's dtype; T is the longest row's length."""
        ids_BT = padded(rows, self.bos_id).to(self.device)
        mask_BT = padded([[1] * len(row) for row in rows], 0).to(self.device)
        logits: Tensor = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits

    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token, int32 [vocab_size], 0 for special tokens.

        Raises:
            NanorayError: the vocabulary's pieces do not show their bytes (WordPiece and others).
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend else None
        shape = json.dumps(decoder, ensure_ascii=False)
        byte_level = "ByteLevel" in shape
        if not byte_level and _SPACE not in shape:
            raise NanorayError(
                f"the tokenizer of {self.name} does not tell how many bytes a token stands for "
                f"(its decoder is neither byte-level nor SentencePiece's); evaluate CORE only"
            )
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._tokenizer.added_tokens_decoder  # stored as plain text
        for piece, token in self._tokenizer.get_vocab().items():
            if token in added:
                special = added[token].special or token in self._tokenizer.all_special_ids
                sizes[token] = 0 if special else len(piece.encode())
            elif byte_level:
                sizes[token] = len(piece)  # one character stands for each byte
            elif _BYTE_PIECE.fullmatch(piece):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace(_SPACE, " ").encode())
        return sizes
