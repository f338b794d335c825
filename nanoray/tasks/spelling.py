"""Spelling a word, and counting a letter in it: what a model that reads tokens cannot see.

`SimpleSpelling` teaches which letters a token is made of. `SpellingBee` begins its answer with the
same line, walks along the letters with a running count, and checks the count with the calculator:

    Letters of strawberry: s t r a w b e r r y
    Running count of r: s0 t0 r1 a1 w1 b1 e1 r2 r3 y3
    Checked with Python: (the call "strawberry".count("r") and its output, 3)
    The letter r occurs 3 times in strawberry.
    #### 3

A BPE tokenizer makes one token of a letter with the space before it, so that a letter is the same
token in every line, and the word, always after a space, the same tokens. The idea of the two tasks
is nanochat's (``tasks/spellingbee.py``).
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable
from typing import Literal

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.base import Task, reference_answer
from nanoray.tasks.spelling_questions import COUNT_ENGLISH, COUNT_FOREIGN, SPELL, Wording
from nanoray.tasks.worked_answer import final_number
from nanoray.tokenizer import Conversation

Split = Literal["train", "test"]

MIN_WORDS = 20
_TEST_SHARE = 10  # one word in ten is for testing
_LETTER_FROM_WORD = 0.9  # nanochat's; the others do not occur in it
_ENGLISH = 0.7
_USABLE = re.compile(r"[a-z]{2,20}")

# How people write what they ask about, and how often (in percent).
_QUOTES = {"{}": 55, '"{}"': 20, "'{}'": 20, "*{}*": 5}
_Cases = dict[Callable[[str], str], int]
_WORD_CASES: _Cases = {str.lower: 90, str.capitalize: 6, str.upper: 4}
_LETTER_CASES: _Cases = {str.lower: 90, str.upper: 10}
_KEEP_CAPITALS = 0.7  # of the question around them
_KEEP_MARK = 0.75


class _WordTask(Task):
    """A task about one word of a list for each example; test and train share no word."""

    kind = "generative"

    def __init__(
        self, name: str, split: Split, words_uri: str, num_examples: int, seed: int
    ) -> None:
        super().__init__(name, num_examples)
        self.split = split
        self.seed = seed
        self._words = _load_words(words_uri, split)

    def _draw(self, number: int) -> tuple[random.Random, str]:
        """The example's own source of chance, and its word."""
        rng = random.Random(f"{self.seed} {self.name} {self.split} {number}")
        return rng, rng.choice(self._words)


class SimpleSpelling(_WordTask):
    """ "Spell the word apple": right is the whole line of letters, exactly.

    Args:
        words_uri: a file with a word per line, such as `nanoray.data.words.word_list` makes.
            Example i is a pure function of (split, seed, i, words).

    Raises:
        NanorayError: the file is not there, no UTF-8, or has too few usable words.
    """

    def __init__(self, split: Split, words_uri: str, num_examples: int, seed: int = 42) -> None:
        super().__init__("simple-spelling", split, words_uri, num_examples, seed)

    def _example(self, number: int) -> Conversation:
        rng, word = self._draw(number)
        question = _ask(rng, rng.choice(SPELL), word=_written(rng, word, _WORD_CASES))
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": spelled(word)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.strip() == reference_answer(conversation)


class SpellingBee(_WordTask):
    """ "How many r are in strawberry?", asked in many ways and languages; right is the number.

    Args and errors as `SimpleSpelling`'s. The baseline is 0 as in nanochat, so that ChatCORE means
    the same; but most letters stand in their word once: always "1" is right for about a half.
    """

    def __init__(self, split: Split, words_uri: str, num_examples: int, seed: int = 42) -> None:
        super().__init__("spelling-bee", split, words_uri, num_examples, seed)

    def _example(self, number: int) -> Conversation:
        rng, word = self._draw(number)
        letter = rng.choice(word)
        if rng.random() >= _LETTER_FROM_WORD:
            letter = rng.choice(sorted(set(string.ascii_lowercase) - set(word)))
        wording = rng.choice(COUNT_ENGLISH if rng.random() < _ENGLISH else COUNT_FOREIGN)
        question = _ask(
            rng,
            wording,
            letter=_written(rng, letter, _LETTER_CASES),
            word=_written(rng, word, _WORD_CASES),
        )
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _count_answer(word, letter)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        number = final_number(completion)
        return number is not None and number == final_number(reference_answer(conversation))


def spelled(word: str) -> str:
    """The line that spells a word."""
    return f"Letters of {word}: {' '.join(word)}"


def counted(word: str, letter: str) -> str:
    """The line that walks along a word: after each letter, how often ``letter`` came so far."""
    walk = (f"{char}{word[: i + 1].count(letter)}" for i, char in enumerate(word))
    return f"Running count of {letter}: {' '.join(walk)}"


def _count_answer(word: str, letter: str) -> list[dict[str, str]]:
    count = word.count(letter)
    times = "time" if count == 1 else "times"
    lines = (spelled(word), counted(word, letter), "Checked with Python:")
    sentence = f"The letter {letter} occurs {count} {times} in {word}."
    return [
        {"type": "text", "text": "\n".join(lines)},
        # Double quotes: the tokenizer's pattern takes the 's of 'spell' for an English ending and
        # would tear the word apart.
        {"type": "python", "text": f'"{word}".count("{letter}")'},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n{sentence}\n#### {count}"},
    ]


def split_of(word: str) -> Split:
    """The one split that ``word`` may be asked about in, whatever list it stands in."""
    digest = hashlib.sha256(word.encode()).digest()
    return "test" if digest[0] * 256 + digest[1] < 65536 // _TEST_SHARE else "train"


def _load_words(uri: str, split: Split) -> list[str]:
    """The split's words of a list: of the letters a to z, 2 to 20 of them, each once, in order."""
    uri = storage.normalize(uri)
    mend = "give a text file in UTF-8 with one word per line"
    try:
        with storage.explained(f"the word list {uri} cannot be read", mend, FileNotFoundError):
            text = storage.read_text(uri)
    except FileNotFoundError:
        raise NanorayError(f"there is no word list at {uri}; {mend}") from None
    lines = dict.fromkeys(line.strip().lower() for line in text.splitlines())
    usable = [word for word in lines if _USABLE.fullmatch(word)]
    words = [word for word in usable if split_of(word) == split]
    if len(usable) < MIN_WORDS or not words:
        raise NanorayError(
            f"the word list {uri} has {len(usable)} usable words (2 to 20 letters, a to z only), "
            f"{len(words)} of them for the {split} split; give at least {MIN_WORDS}, one per line, "
            f"better some hundred"
        )
    return words


def _written(rng: random.Random, text: str, cases: _Cases) -> str:
    (case,) = rng.choices(list(cases), list(cases.values()))
    (quotes,) = rng.choices(list(_QUOTES), list(_QUOTES.values()))
    return quotes.format(case(text))


def _ask(rng: random.Random, wording: Wording, **asked: str) -> str:
    """A question in that wording, typed with more or less care."""
    pattern, mark = wording
    if rng.random() >= _KEEP_CAPITALS:
        pattern = pattern.lower()
    if rng.random() < _KEEP_MARK:
        pattern += mark
    return pattern.format(**asked)
