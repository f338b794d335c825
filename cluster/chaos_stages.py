"""The pipeline that `chaos.py` disturbs: each stage's command, and what must come of it.

A tiny model is pretrained, taught to guess one of two answers, practises until it guesses better,
and is served. Everything is exact (fp32, sampling in step with learning), so that
a run in which something was killed must end with the very numbers of one that was left alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import requests
import yaml

from nanoray.metrics import read_records

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "sft", "rl", "serve")
STEPS = {"pretrain": 60, "sft": 50, "rl": 10}
QUESTIONS_PER_STEP = 4
_PROMPTS = ("Question 3: how many?", "Return the")
NUM_REPLICAS = 2
_QUESTIONS = [f"Question {number}: how many?" for number in range(80)]
_RIGHT, _WRONG = "#### 5", "#### 6"
_ANSWER_TOKENS = 64
_NUM_CLIENTS = 4

# The workers of a run share the one trainer node, also the next one: how many share a node decides
# how many threads each has, and with it the last bits of its sums.
_EXACT = {
    "dtype": "float32", "compile-mode": "off", "seed": 7, "eval-every": 0, "sample-every": 0,
}  # fmt: skip
_FLAGS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "corpus": "docstrings", "depth": 2, "aspect-ratio": 16, "head-dim": 16,
        "max-seq-len": 128, "total-batch-size": 1024, "device-batch-size": 8,
        "warmup-steps": 5, "eval-tokens": 2048, "num-workers": 2, "save-every": 10,
    },
    "sft": {
        "eval-tokens": 1024, "init-lr-frac": 1.0, "chatcore-tasks": "", "num-workers": 2,
        "save-every": 10,
    },
    "rl": {
        "task": "gsm8k", "questions-per-step": QUESTIONS_PER_STEP, "num-samples": 4,
        "questions-per-call": 1, "max-new-tokens": 12, "rollout-actors": 2, "max-staleness": 0,
        "eval-examples": 4, "eval-samples": 2, "save-every": 3,
    },
}  # fmt: skip


def preparations(home: Path) -> list[list[str]]:
    """Write conversations and problems into a new ``NANORAY_HOME``; the commands for the rest."""
    for split, asked in (("train", _QUESTIONS[:64]), ("test", _QUESTIONS[64:])):
        problems = [{"question": question, "answer": _RIGHT} for question in asked]
        _write_lines(home / "tasks" / "gsm8k" / f"{split}.jsonl", problems)
    # Both answers are learnt: where all samples were alike, there would be nothing to practise.
    turns = [(q, answer) for q in _QUESTIONS for answer in (_RIGHT, _WRONG)]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]}
        for q, answer in turns
    ]
    _write_lines(home / "chats.jsonl", chats)
    return [
        _job("data", "build", corpus="docstrings", max_bytes=400_000),
        _job("tokenizer", "train", corpus="docstrings", vocab_size=512),
    ]


def training_command(stage: str, name: str, home: Path) -> list[str]:
    """The command of a stage of the pipeline ``name``; the same one goes on after a loss."""
    flags = {**_EXACT, **_FLAGS[stage], "num-iterations": STEPS[stage], "run": f"{name}-{stage}"}
    if stage == "sft":
        flags |= {"from-run": f"{name}-pretrain", "mixture": home / "chats.jsonl"}
    if stage == "rl":
        flags |= {"from-run": f"{name}-sft", "data-dir": home / "tasks"}
    return _job(stage, **flags)


def _job(*words: str, **flags: Any) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", f"jobs.{words[0]}", *words[1:], *given]


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- what training leaves


def last_step(run_dir: Path) -> int:
    """The last step in a run's log; 0 while there is none, -1 before the run has begun."""
    if not (run_dir / "config.json").exists():
        return -1
    records = read_records(str(run_dir / "metrics.jsonl"))
    return max((record["step"] for record in records if "batch_hash" in record), default=0)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """What must be equal, by what it is called in messages.

    Losses and rewards are those of the final timeline, in order; files are told by their hash.

    Raises:
        OSError, ValueError, KeyError: a run that has ended has no such folder.
    """
    records = read_records(str(run_dir / "metrics.jsonl"))
    trained = [record for record in records if "batch_hash" in record]
    summary = json.loads((run_dir / "summary.json").read_text())
    checkpoint = max(path.parent for path in run_dir.glob("checkpoints/*/manifest.json"))
    found = {
        "status": summary["status"],
        "checkpoint": checkpoint.name,
        "steps": [record["step"] for record in trained],
        "batches": [record["batch_hash"] for record in trained],
        "losses": [record["loss"] for record in trained],
        "rewards": [record["reward"] for record in trained if "reward" in record],
        "figures": {key: summary.get(key) for key in ("tokens", "loss", "val_bpb", "metrics")},
        "tensors": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(checkpoint.glob("*.safetensors"))
        },
    }
    ledger = json.loads((checkpoint / "meta.json").read_text()).get("ledger")
    if ledger:
        counts = {key: ledger["counts"][key] for key in ("trained", "dropped", "filtered")}
        found["ledger"] = {"minted": ledger["next_number"], "open": ledger["open"], **counts}
    return found


def differences(truth: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Where an outcome is not the truth's, a sentence each; empty: they are equal."""
    told = []
    for what in sorted(truth.keys() | found.keys()):
        wanted, got = truth.get(what), found.get(what)
        if wanted == got:
            continue
        if isinstance(wanted, list) and isinstance(got, list):
            pairs = itertools.zip_longest(wanted, got)
            place = next(i for i, (a, b) in enumerate(pairs) if a != b)
            of = f" (the first {place} are equal, {len(got)} of {len(wanted)})"
            wanted, got = wanted[place : place + 1], got[place : place + 1]
        else:
            of = ""
        told.append(f"{what} are {got} instead of {wanted}{of}")
    return told


def check_truth(truths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why the undisturbed runs cannot tell right from wrong, a sentence each; empty: they can."""
    told = []
    for stage, truth in truths.items():
        if stage == "serve":
            continue
        if truth["status"] != "finished" or truth["steps"] != list(range(1, STEPS[stage] + 1)):
            told.append(f"{stage} is {truth['status']} with steps {truth['steps']}")
        if len(set(truth["losses"])) < 2:
            told.append(f"{stage} does not learn")
    if "rl" in truths:
        rl, prompts = truths["rl"], QUESTIONS_PER_STEP * STEPS["rl"]
        if not any(0 < reward < 1 for reward in rl["rewards"]):
            told.append("no answer of rl is better than another")
        if rl["ledger"]["trained"] != prompts or rl["ledger"]["minted"] != prompts:
            told.append(f"rl has trained {rl['ledger']} instead of {prompts} prompts once each")
    return told


# ---- serving


def questions(trained: Sequence[str]) -> list[str]:
    """What clients ask of the models of these stages: a model's name and a prompt, with / between.

    The later models say little; the first goes on and on.
    """
    return [f"{stage}/{prompt}" for stage in trained for prompt in _PROMPTS]


def chat_config(name: str, trained: Sequence[str], port: int) -> dict[str, Any]:
    """`serve/chat.yaml` for the models of a pipeline, with two replicas: for ``serve deploy``."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "chat.yaml").read_text())
    # The nodes share this machine, and with it the port.
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (deployment,) = config["applications"][0]["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": NUM_REPLICAS}
    models = [{"name": stage, "run": f"{name}-{stage}"} for stage in trained]
    deployment["user_config"] |= {"models": models, "dtype": "float32"}
    return config


@dataclass(frozen=True)
class Answer:
    """What a client got: all of the text, or a beginning of it and the error that ended it."""

    question: str
    text: str
    error: str = ""


def ask(url: str, question: str, stream: bool) -> Answer:
    """Have a model continue a prompt, greedily."""
    model, prompt = question.split("/", 1)
    body = {"model": model, "prompt": prompt, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    text = ""
    try:
        with requests.post(
            f"{url}/v1/completions", json=body | {"stream": stream}, stream=stream, timeout=60
        ) as response:
            if response.status_code != 200:
                return Answer(question, "", f"HTTP {response.status_code}")
            if not stream:
                return Answer(question, response.json()["choices"][0]["text"])
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    return Answer(question, text)
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        return Answer(question, text, f"event {event['error']['code']}")
                    text += event["choices"][0]["text"]
        return Answer(question, text, "broken off without a word")
    except requests.RequestException as error:
        return Answer(question, text, f"connection ({type(error).__name__})")


def wrong_answers(truth: Mapping[str, str], answers: Sequence[Answer]) -> list[str]:
    """What clients must never see, a sentence each: other text, errors of other kinds."""
    told = Counter[str]()
    for answer in answers:
        right = truth[answer.question]
        whole = not answer.error
        if not right.startswith(answer.text) or (whole and answer.text != right):
            told[f"{answer.question!r} was answered {answer.text!r} instead of {right!r}"] += 1
        elif not whole and not answer.error.startswith(("HTTP 5", "event ", "connection ")):
            told[f"a client's error was: {answer.error}"] += 1
    return [f"{what} ({times} times)" for what, times in told.items()]


class Clients:
    """Threads that ask one question after another, half of them streamed, until the block ends."""

    def __init__(self, url: str, asked: Sequence[str]) -> None:
        self.answers: list[Answer] = []
        self._url, self._asked = url, asked
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), daemon=True)
            for number in range(_NUM_CLIENTS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask_on(self, number: int) -> None:
        while not self._over.is_set():
            question = self._asked[number // 2 % len(self._asked)]
            answer = ask(self._url, question, stream=number % 2 == 1)
            number += 2
            self.answers.append(answer)
            if answer.error:
                time.sleep(0.2)
