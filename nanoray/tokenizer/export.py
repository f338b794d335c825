"""A tokenizer in Hugging Face's form, for tools that read nothing else (evaluation harnesses)."""

from __future__ import annotations

import json
import os
from typing import Any

from nanoray import storage
from nanoray.tokenizer.base import SPECIAL_TOKENS, Tokenizer
from nanoray.tokenizer.bpe import BPETokenizer


def export_hf(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder or under a URI.

    `transformers.AutoTokenizer.from_pretrained(folder)` then encodes as ours does, BOS included
    if special tokens are asked for. `tokenizers.Tokenizer.from_file` does, too, once its
    `encode_special_tokens` is set: else names of special tokens inside a text become their ids.
    The folder must not be the one that `Tokenizer.save` writes: the names are the same.
    """
    base = storage.normalize(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>",  # where the next document begins, the last one has ended
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # their names inside a text are text
    }
    for name, content in (
        ("tokenizer.json", _tokenizer_json(tokenizer)),
        ("tokenizer_config.json", config),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        storage.write_bytes(storage.join(base, name), text.encode())


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    specials = {token: name for name, token in tokenizer.special_tokens.items()}
    letters = _byte_letters()
    vocab: dict[str, int] = {}
    ranks: dict[bytes, int] = {}
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.decode_bytes([token])
        if token in specials:
            vocab[specials[token]] = token
        else:
            vocab["".join(letters[byte] for byte in piece)] = token
            ranks[piece] = token
    merges = [["".join(letters[byte] for byte in part) for part in pair] for pair in _merges(ranks)]
    split = []
    if isinstance(tokenizer, BPETokenizer):
        pattern = {"Regex": tokenizer.pattern}
        split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    bos = {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}
    begin = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}]
    text, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokenizer.special_tokens[name],
                "content": name,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": True,
            }
            for name in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*split, {**byte_level, "use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, text],
            "pair": [*begin, text, second],
            "special_tokens": {"<|bos|>": bos},
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix"), None),
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A piece that is a token is that token, as in tiktoken. Without pieces it would find
            # a text that is a special token's name.
            "ignore_merges": bool(split),
            "vocab": vocab,
            "merges": merges,
        },
    }


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make a token, in the order of its rank.

    tiktoken joins neighbours whenever the whole is a token, however that came to be when it was
    trained; so each of the ways has to be listed.
    """
    merges = []
    for whole in sorted(ranks, key=ranks.__getitem__):
        pairs = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in such files (since GPT-2): its own Latin-1
    letter if that can be seen, else one of those from U+0100 on.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    letters = {byte: chr(byte) for byte in seen}
    letters |= {byte: chr(0x100 + number) for number, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]
