"""Spelling and counting letters: right, in form, disjoint, and askable in many ways."""

from __future__ import annotations

import itertools
import random
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks import spelling
from nanoray.tasks.base import reference_answer
from nanoray.tasks.spelling import SimpleSpelling, SpellingBee, counted, spelled, split_of
from nanoray.tasks.spelling_questions import COUNT_ENGLISH, COUNT_FOREIGN, SPELL
from nanoray.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, train_tokenizer
from nanoray.tools.calculator import calculate

NUM_EXAMPLES = 1500
SPLITS: tuple[spelling.Split, ...] = ("train", "test")
QUESTIONS = [
    "in the word apples, how many 'a' do you see",
    'Combien de "v" y a-t-il dans *appleb* ?',
    "for a puzzle i need the number of p in applea.",
]
words_of = st.text(string.ascii_lowercase, min_size=2, max_size=20)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pronounceable words, 800 different ones."""
    rng = random.Random(0)
    made: set[str] = set()
    while len(made) < 800:
        syllables = (rng.choice("bcdfglmnprstvz") + rng.choice("aeiou") for _ in range(4))
        made.add("".join(itertools.islice(syllables, rng.randint(2, 4))))
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(sorted(made)) + "\n")
    return str(path)


def parts(conversation: Any) -> list[tuple[str, str]]:
    return [(part["type"], part["text"]) for part in conversation["messages"][1]["content"]]


def test_the_answer_written_out(tmp_path: Path) -> None:
    """Of one word and letter, against what the module promises."""
    (tmp_path / "words.txt").write_text("\n".join(f"strawberry{c}" for c in "abcdefghijklmnopqrst"))
    task = SpellingBee("train", str(tmp_path / "words.txt"), 500)
    found = next(
        example
        for example in map(task.example, range(500))
        if ("python", '"strawberrya".count("r")') in parts(example)
    )
    assert parts(found) == [
        (
            "text",
            "Letters of strawberrya: s t r a w b e r r y a\n"
            "Running count of r: s0 t0 r1 a1 w1 b1 e1 r2 r3 y3 a3\n"
            "Checked with Python:",
        ),
        ("python", '"strawberrya".count("r")'),
        ("python_output", "3"),
        ("text", "\nThe letter r occurs 3 times in strawberrya.\n#### 3"),
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_every_count_is_right(split: spelling.Split, words: str) -> None:
    task = SpellingBee(split, words, NUM_EXAMPLES)
    tokenizer = ByteTokenizer()
    counts: Counter[int] = Counter()
    for index in range(NUM_EXAMPLES):
        example = task.example(index)
        (_, manual), (_, call), (_, output), (_, end) = parts(example)
        assert calculate(call) == output
        word = call.split('"')[1]
        assert split_of(word) == split
        assert word in example["messages"][0]["content"].lower()
        spelling_line, walk, _ = manual.split("\n")
        assert spelling_line == spelled(word)
        assert walk.endswith(output)
        assert end.endswith(f"#### {output}")
        answer = reference_answer(example)
        assert task.evaluate(example, answer)
        assert task.reward(example, f"#### {output}") == 1
        assert not task.evaluate(example, f"#### {int(output) + 1}")
        assert not task.evaluate(example, output)
        ids, mask = tokenizer.render_conversation(example)
        assert 0 < sum(mask) < len(ids) < 512
        counts[int(output)] += 1
    assert 0.07 < counts[0] / NUM_EXAMPLES < 0.13
    assert counts[2] > 50


@given(words_of, st.sampled_from(string.ascii_lowercase))
def test_the_walk_counts_as_python_does(word: str, letter: str) -> None:
    steps = counted(word, letter).split(": ")[1].split(" ")
    assert "".join(step[0] for step in steps) == word
    assert [int(step[1:]) for step in steps] == [
        word[: i + 1].count(letter) for i in range(len(word))
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_only_the_exact_spelling_is_right(split: spelling.Split, words: str) -> None:
    task = SimpleSpelling(split, words, 200)
    for index in range(len(task)):
        example = task.example(index)
        question, answer = (message["content"] for message in example["messages"])
        word = answer.split(": ")[0].removeprefix("Letters of ")
        assert answer == f"Letters of {word}: {' '.join(word)}"
        assert split_of(word) == split
        assert word in question.lower()
        assert task.evaluate(example, answer)
        assert task.evaluate(example, answer + "\n")
        for wrong in (answer[:-2], answer + " s", answer.replace(" ", ""), word, ""):
            assert not task.evaluate(example, wrong)


@pytest.mark.parametrize("task", [SpellingBee, SimpleSpelling])
def test_train_and_test_share_no_word(task: Any, words: str) -> None:
    asked = {split: set(task(split, words, 1)._words) for split in SPLITS}
    assert not asked["train"] & asked["test"]
    assert len(asked["train"]) + len(asked["test"]) == 800
    assert 0.05 < len(asked["test"]) / 800 < 0.15


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**6), st.sampled_from([SpellingBee, SimpleSpelling]))
def test_a_pure_function_of_split_seed_and_index(
    words: str, seed: int, index: int, task: Any
) -> None:
    one, longer = task("train", words, index + 1, seed), task("train", words, index + 9, seed)
    assert one.example(index) == longer.example(index)


def test_the_questions_of_a_seed_stay(tmp_path: Path) -> None:
    """A run that is resumed by a later version must go on with the same examples."""
    (tmp_path / "words.txt").write_text("\n".join(f"apple{c}" for c in string.ascii_lowercase))
    bee = SpellingBee("train", str(tmp_path / "words.txt"), 3, seed=7)
    assert [bee.example(i)["messages"][0]["content"] for i in range(3)] == QUESTIONS


def test_questions_vary(words: str) -> None:
    task = SpellingBee("train", words, NUM_EXAMPLES)
    questions = [task.example(i)["messages"][0]["content"] for i in range(NUM_EXAMPLES)]
    assert len(set(questions)) > 0.97 * NUM_EXAMPLES
    assert 0.1 < sum(not question.isascii() for question in questions) / NUM_EXAMPLES < 0.3
    assert any('"' in question for question in questions)
    assert any("'" in question for question in questions)
    assert any(question.endswith("?") for question in questions)
    assert any(question[-1].isalnum() for question in questions)
    assert any(question[0].islower() for question in questions)


def test_wordings_are_many_and_whole() -> None:
    assert len(set(COUNT_ENGLISH + COUNT_FOREIGN)) == len(COUNT_ENGLISH + COUNT_FOREIGN) >= 60
    for pattern, mark in COUNT_ENGLISH + COUNT_FOREIGN:
        filled = pattern.format(letter="<l>", word="<w>")
        assert filled.count("<l>") == filled.count("<w>") == 1
        assert mark.strip() in ".?!？。؟"
    for pattern, _ in SPELL:
        assert pattern.format(word="<w>").count("<w>") == 1


def test_letters_are_tokens_of_their_own(words: str) -> None:
    """Also in a small tokenizer: a letter with the space before it, and nothing beside it."""
    text = " ".join(f" {letter} " for letter in string.ascii_lowercase) * 50
    tokenizer = train_tokenizer([text, Path(words).read_text().replace("\n", " ")] * 5, 400)
    assert isinstance(tokenizer, BPETokenizer)
    for word in Path(words).read_text().split()[:50]:
        line = spelled(word)
        letters = [f" {letter}" for letter in word]
        tail = tokenizer.encode(line)[-len(word) :]
        assert [tokenizer.decode([token]) for token in tail] == letters
        walk = tokenizer.encode(counted(word, word[0]).split(":")[1])
        assert [tokenizer.decode([token]) for token in walk[::2]] == [
            f" {letter}" for letter in word
        ]
        assert all(tokenizer.decode([token]).isdigit() for token in walk[1::2])


def test_a_list_is_read_leniently(tmp_path: Path) -> None:
    """Case, line ends, empty lines, duplicates and what is no word do not matter."""
    plain, wild = tmp_path / "plain.txt", tmp_path / "wild.txt"
    words = [f"{a}{b}at" for a, b in itertools.product("bcdfgh", "aeiou")]
    plain.write_text("\n".join(words))
    wild.write_text("\r\n".join(["", "  ", "x", "don't", "naïve", "a b", *words, words[0].upper()]))
    for split in SPLITS:
        ours, theirs = (SpellingBee(split, str(path), 50) for path in (plain, wild))
        assert [ours.example(i) for i in range(50)] == [theirs.example(i) for i in range(50)]


@pytest.mark.parametrize("task", [SpellingBee, SimpleSpelling])
def test_a_bad_list_is_one_sentence(task: Any, tmp_path: Path) -> None:
    def fails(content: bytes | None, match: str, split: str = "train") -> None:
        path = tmp_path / "list.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(NanorayError, match=match) as caught:
            task(split, str(path), 10)
        assert str(path) in str(caught.value)
        assert "one" in str(caught.value)
        assert "\n" not in str(caught.value)

    fails(None, "there is no word list")
    fails(b"", "has 0 usable words")
    fails(b"apple\npear\n", "has 2 usable words")
    fails(b"a1\n" * 100, "has 0 usable words")
    fails(b"appl\xff\n", "cannot be read .*utf-8")
    of_train = [w for w in ("a" * n + "b" for n in range(1, 30)) if split_of(w) == "train"][:19]
    fails("\n".join(of_train).encode(), "has 1[0-9] usable words")
    with pytest.raises(NanorayError, match="cannot be read"):
        task("train", str(tmp_path), 10)
    enough = itertools.product("bcd", "aeiou", "lmn")
    only_train = [w for w in map("".join, enough) if split_of(w) == "train"]
    fails("\n".join(only_train).encode(), "0 of them for the test split", "test")


def test_from_an_object_store(words: str) -> None:
    uri = "memory://spelling-words/words.txt"
    storage.write_text(uri, Path(words).read_text())
    local, remote = SpellingBee("test", words, 20), SpellingBee("test", uri, 20)
    assert [local.example(i) for i in range(20)] == [remote.example(i) for i in range(20)]


def test_a_dictionary(shared_data: Path) -> None:
    path = str(shared_data / "words" / "words_alpha.txt")
    train, test = (SimpleSpelling(split, path, 5) for split in SPLITS)
    assert 0.095 < len(test._words) / (len(test._words) + len(train._words)) < 0.105


def test_the_tokenizer_sees_every_example(words: str, tokenizer_dir: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    for task in (SpellingBee("train", words, 200), SimpleSpelling("train", words, 200)):
        for index in range(len(task)):
            ids, _ = tokenizer.render_conversation(task.example(index))
            assert tokenizer.decode(ids).count("<|assistant_end|>") == 1
