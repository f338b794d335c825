"""``python -m jobs.tokenizer train|eval``: train a BPE tokenizer; see how it compresses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from nanoray import storage
from nanoray.config import TokenizerConfig, UsageError, run_job
from nanoray.data.shards import OnBad, list_shards, read_row_group, row_groups, split_shards
from nanoray.errors import NanorayError
from nanoray.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    compare_compression,
    load_tokenizer,
    train_tokenizer,
)

USAGE = "usage: python -m jobs.tokenizer train|eval [flags]; --help after the word lists the flags"


def main(argv: Sequence[str]) -> int:
    commands = {"train": train, "eval": evaluate}
    if not argv or argv[0] not in commands:
        if argv and argv[0] in ("-h", "--help"):
            print(f"{__doc__}\n\n{USAGE}")
            return 0
        raise UsageError(USAGE)
    config = TokenizerConfig.parse(argv[1:], f"python -m jobs.tokenizer {argv[0]}")
    return commands[argv[0]](config)


def _directory(config: TokenizerConfig) -> str:
    corpus_name = storage.data_dir(config.corpus).rsplit("/", 1)[-1]
    return storage.tokenizer_dir(config.tokenizer or corpus_name)


def _texts(shards: Sequence[str], on_bad: OnBad, skipped: Counter[str]) -> Iterator[str]:
    for shard in shards:
        for group in row_groups([shard], on_bad, skipped):
            texts, bad = read_row_group(shard, group.row_group, on_bad)
            skipped.update(bad)
            yield from texts


def _print_skipped(skipped: Counter[str]) -> None:
    for kind, count in sorted(skipped.items()):
        print(f"left out: {count:,} {kind.replace('_', ' ')}")


def train(config: TokenizerConfig) -> int:
    shards, _validation = split_shards(list_shards(storage.data_dir(config.corpus)))
    directory = _directory(config)
    storage.check_writable(directory)
    print(f"{len(shards)} training shards of {config.corpus} -> {directory}", flush=True)
    if config.dry_run:
        print("dry run: configuration and data are fine")
        return 0
    start = time.perf_counter()
    skipped: Counter[str] = Counter()
    tokenizer: Tokenizer
    if config.byte_level:
        tokenizer = ByteTokenizer()
    else:
        tokenizer = train_tokenizer(
            _texts(shards, config.on_bad_shard, skipped),
            config.vocab_size,
            max_chars=config.max_chars,
            doc_cap=config.doc_cap,
        )
        assert isinstance(tokenizer, BPETokenizer)
    tokenizer.save(directory)
    seconds = time.perf_counter() - start
    print(f"vocabulary of {tokenizer.vocab_size:,} in {seconds:.1f} s: {directory}")
    _print_skipped(skipped)
    return 0


def evaluate(config: TokenizerConfig) -> int:
    tokenizer = load_tokenizer(_directory(config))
    console = Console(highlight=False)
    if config.show is not None:
        console.print(tokenizer.visualize(tokenizer.encode(config.show)))
        return 0
    texts = _validation_texts(config)
    if config.dry_run:
        print(f"dry run: {len(texts):,} validation documents are fine")
        return 0
    table = Table("tokenizer", "vocabulary", "bytes", "tokens", "bytes/token", "note")
    for row in compare_compression(tokenizer, texts):
        numbers = (row.vocab_size, row.num_bytes, row.num_tokens)
        rate = f"{row.bytes_per_token:.3f}" if row.bytes_per_token else "-"
        table.add_row(row.name, *(f"{n:,}" if n else "-" for n in numbers), rate, row.note)
    console.print(table)
    return 0


def _validation_texts(config: TokenizerConfig) -> list[str]:
    _train, validation = split_shards(list_shards(storage.data_dir(config.corpus)))
    texts: list[str] = []
    chars = 0
    skipped: Counter[str] = Counter()
    for text in _texts(validation, config.on_bad_shard, skipped):
        texts.append(text)
        chars += len(text)
        if chars >= config.eval_chars:
            break
    _print_skipped(skipped)
    if not texts:
        raise NanorayError(
            f"the validation shard {validation[0]} has no usable text; build the corpus again"
        )
    return texts


if __name__ == "__main__":
    run_job(main)
