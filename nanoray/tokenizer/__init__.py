"""From text to token ids and back: the BPE and byte tokenizers, chat rendering, training.

    tokenizer = train_tokenizer(texts, vocab_size=32_768)
    tokenizer.save(directory)
    tokenizer = load_tokenizer(directory)

Imports neither torch nor ray: the packing tasks of the data stream import this.
"""

from nanoray.tokenizer.base import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from nanoray.tokenizer.bpe import SPLIT_PATTERN, BPETokenizer
from nanoray.tokenizer.byte import ByteTokenizer
from nanoray.tokenizer.conversation import Conversation
from nanoray.tokenizer.export import export_hf
from nanoray.tokenizer.training import CompressionRow, compare_compression, train_tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "BPETokenizer",
    "ByteTokenizer",
    "CompressionRow",
    "Conversation",
    "Tokenizer",
    "compare_compression",
    "export_hf",
    "load_tokenizer",
    "train_tokenizer",
]
