"""Hugging Face models: a tiny random GPT-2 with a tokenizer of its own, saved and loaded."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_texts

from nanoray.errors import NanorayError
from nanoray.evals.bpb import bits_and_bytes
from nanoray.evals.core import evaluate_examples
from nanoray.evals.core_bundle import Example, Task
from nanoray.evals.core_render import Question, build_question
from nanoray.evals.core_score import EMPTY_SPAN
from nanoray.evals.hf import HFModel, load_hf

CPU = torch.device("cpu")


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    return tokenizer


def sentence_pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "é", "th", "▁th"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def save(folder: Path, backend: Any, safe: bool = True, **special: str) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = transformers.GPT2LMHeadModel(config)
    if safe:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    return save(tmp_path_factory.mktemp("hf"), byte_level(), eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model(folder: str) -> HFModel:
    return load_hf(folder, CPU, torch.float32)


@torch.no_grad()
def naive_losses(model: HFModel, row: list[int], start: int) -> list[float]:
    logits_TV = model._model(torch.tensor([row])).logits[0]
    losses = F.cross_entropy(logits_TV[:-1], torch.tensor(row[1:]), reduction="none")
    return losses[start - 1 :].tolist()


def test_what_is_loaded(model: HFModel, folder: str) -> None:
    assert (model.max_len, model.vocab_size, model.bos_id) == (64, 320, 0)
    assert model.encode("The river")[0] != model.bos_id
    assert [ids.tolist() for ids in model.encode_batch(["The river", ""])] == [
        model.encode("The river"),
        [],
    ]
    assert load_hf(folder, CPU, torch.float32, max_len=20).max_len == 20


def test_scores_equal_a_forward_of_each_row(
    model: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(30)
    rows = [[0, *model.encode(text)][: 5 + 2 * i] for i, text in enumerate(texts)]
    questions = [
        Question((rows[i], rows[i + 1]), (2 + i, len(rows[i + 1]) - 1)) for i in range(0, 24, 2)
    ]
    questions.append(Question(([0, 1], [0, 1, 2]), (2, 2)))
    scored = model.score(questions)
    monkeypatch.setattr("nanoray.evals.hf._CPU_LOGITS", 1)  # row by row
    assert len(scored) == len(questions)
    for question, scores, alone in zip(questions, scored, model.score(questions)):
        for row, start, score, other in zip(question.rows, question.starts, scores, alone):
            if start == len(row):
                assert score is other is EMPTY_SPAN
                continue
            expected = naive_losses(model, row, start)
            assert score.loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)
            assert other.loss == pytest.approx(score.loss, abs=1e-4)


def test_core_on_long_prompts(model: HFModel) -> None:
    texts = make_texts(12)
    examples = tuple(
        Example((text,) * 2, ("quiet river", "old engine"), i % 2) for i, text in enumerate(texts)
    )
    task = Task("toy", "multiple_choice", 3, "\nAnswer: ", 0.5, examples)
    results = evaluate_examples(task, range(12), model)
    for result in results:
        question = build_question(task, result.index, model, 64)
        losses = [
            sum(found) / len(found)
            for found in (
                naive_losses(model, *pair) for pair in zip(question.rows, question.starts)
            )
        ]
        assert max(map(len, question.rows)) == 64
        assert result.prediction == losses.index(min(losses))


def test_bits_per_byte(model: HFModel) -> None:
    text = "The quiet river follows — the old engine."
    row = [model.bos_id, *model.encode(text)]
    bits, num_bytes = bits_and_bytes(
        model.token_losses, np.array([row]), model.token_bytes(), 2, CPU
    )
    assert num_bytes == len(text.encode())
    assert bits == pytest.approx(sum(naive_losses(model, row, 1)) / math.log(2), rel=1e-4)


@pytest.mark.parametrize("build", [byte_level, sentence_pieces])
def test_token_bytes_add_up_to_the_text(tmp_path: Path, build: Any) -> None:
    model = load_hf(save(tmp_path, build(), bos_token="<|endoftext|>"), CPU, torch.float32)
    sizes = model.token_bytes()
    assert sizes.dtype == np.int32
    assert sizes.shape == (model.vocab_size,)
    assert sizes[model.bos_id] == 0
    for text in ["the path", "é", "日本 🙂", "a\n\tb <0x41", "  the  "]:
        assert sizes[model.encode(text)].sum() == len(text.encode()), text


def test_word_pieces_have_no_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[E]": 1}, unk_token="a"))
    model = load_hf(save(tmp_path, backend, eos_token="[E]"), CPU, torch.float32)
    with pytest.raises(NanorayError, match="does not tell how many bytes"):
        model.token_bytes()


def test_no_token_to_begin_with(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    with pytest.raises(NanorayError, match="neither a BOS nor an end-of-text token"):
        load_hf(folder, CPU, torch.float32)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), safe=False, eos_token="<|endoftext|>")
    with pytest.raises(NanorayError, match=r"cannot be loaded .*give a folder with config.json"):
        load_hf(folder, CPU, torch.float32)


def test_nothing_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(NanorayError, match=r"model .*nothing cannot be loaded"):
        load_hf(str(tmp_path / "nothing"), CPU, torch.float32)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return importer(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(NanorayError, match=r"pip install 'nanoray\[hf\]'"):
        load_hf("gpt2", CPU, torch.float32)
