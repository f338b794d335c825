"""EleutherAI's harness, through /v1/completions, finds what our own evaluation finds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_models import one_thread, tiny  # noqa: F401
from serve_models import SmallHost, app_of, running, served

from nanoray.evals.core import evaluate_examples, task_result
from nanoray.evals.core_bundle import Example, Task
from nanoray.evals.core_render import build_question
from nanoray.evals.core_score import CachedScorer
from nanoray.tokenizer import export_hf, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ADJECTIVES = "quiet old bright narrow heavy green distant careful wooden simple".split()


def _examples(count: int, num_choices: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    nouns = "river mountain teacher engine garden window letter captain".split()
    return [
        {
            "question": f"Story {i}. The {rng.choice(nouns)} opens the {rng.choice(nouns)}, the",
            "gold": rng.randrange(num_choices),
        }
        for i in range(count)
    ]


def _write_tasks(folder: Path, examples: list[dict[str, Any]], choices: list[str]) -> None:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    tasks = {
        "choosing": {
            "output_type": "multiple_choice",
            "doc_to_choice": choices,
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
        "saying": {
            "output_type": "loglikelihood",
            # Its delimiter is not applied to this kind, so the target brings the space.
            "target_delimiter": "",
            "doc_to_target": " {{" + json.dumps(choices) + "[gold]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))


def test_lm_eval_scores_as_we_do(
    tmp_path: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is an extra of dev")
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer(tokenizer_dir)
    model = tiny(vocab_size=tokenizer.vocab_size)
    # Of one token each: the harness sums log-probabilities where we take their mean.
    choices = [word for word in ADJECTIVES if len(tokenizer.encode(f" {word}")) == 1]
    assert len(choices) > 3
    with torch.no_grad():  # likely enough to be said at times
        model.lm_head.weight[[tokenizer.encode(f" {word}")[0] for word in choices]] *= 2
    examples = _examples(30, len(choices))
    _write_tasks(tmp_path, examples, choices)
    export_hf(tokenizer, tmp_path / "tokenizer")
    host = SmallHost(served("base", model, chat=False, tokenizer=tokenizer))
    with running(app_of(host)) as url:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "base",
                "base_url": url + "/v1/completions",
                "tokenizer": str(tmp_path / "tokenizer"),
                "tokenizer_backend": "huggingface",
                "add_bos_token": True,
                "max_length": 400,
                "batch_size": 8,
                "num_concurrent": 1,
            },
            tasks=["choosing", "saying"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    host.close()
    scorer = CachedScorer(model, tokenizer)
    asked = [Example((e["question"],) * len(choices), tuple(choices), e["gold"]) for e in examples]
    choosing = Task("choosing", "multiple_choice", 0, " ", 0.25, tuple(asked))
    said = [Example((e["question"],), (choices[e["gold"]],), 0) for e in examples]
    saying = Task("saying", "language_modeling", 0, " ", 0.0, tuple(said))
    for task in (choosing, saying):
        whole = task_result(task, evaluate_examples(task, range(len(examples)), scorer))
        assert results["results"][task.label]["acc,none"] == pytest.approx(whole.accuracy)
        assert 0 < whole.accuracy < 1
    for sample in results["samples"]["choosing"]:
        question = build_question(choosing, sample["doc_id"], scorer, scorer.max_len)
        ours = [-score.loss for score in scorer.score([question])[0]]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-4)
