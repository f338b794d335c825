"""The demo in a fresh home: how long it takes, its validation against gzip -9, what it answers.

    python bench/demo.py

gzip compresses the very bytes that the validation counts, as one stream. The accuracies are those
of the table at the demo's end.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from dataclasses import fields

from demo_home import ROOT, environment, job

from nanoray import storage

COMMANDS = {
    "build_s": job("jobs.data", "build", "--corpus", "docstrings"),
    "tokenizer_s": job("jobs.tokenizer", "train", "--config", "jobs/demo_tokenizer.yaml"),
    "pretrain_s": job("jobs.pretrain", "--config", "jobs/demo_pretrain.yaml"),
    "sft_s": job("jobs.sft", "--config", "jobs/demo_sft.yaml"),
    "eval_s": job("jobs.eval", "chat", "--config", "jobs/demo_eval.yaml"),
    "rl_s": job("jobs.rl", "--config", "jobs/demo_rl.yaml"),
}


def validation_text(home: str) -> bytes:
    """The text of the run's validation rows, special tokens left out."""
    from nanoray.data.plan import validation_rows
    from nanoray.tokenizer import load_tokenizer
    from nanoray.train.plan import PretrainPlan

    content = json.loads(storage.read_bytes(f"{home}/runs/demo/config.json"))
    names = {field.name for field in fields(PretrainPlan)}
    plan = PretrainPlan.from_dict({k: v for k, v in content.items() if k in names})
    tokenizer = load_tokenizer(plan.tokenizer_dir)
    rows = validation_rows(
        plan.validation_row_groups(),
        tokenizer,
        sequence_len=plan.model_config.sequence_len,
        num_tokens=plan.config["eval_tokens"],
        on_bad="fail",
    )
    targets = rows[:, 1:].reshape(-1)
    return tokenizer.decode_bytes(targets[tokenizer.token_bytes()[targets] > 0].tolist())


def chat_accuracies(home: str) -> dict[str, float]:
    checkpoints = f"{home}/runs/demo-sft/evals"
    (step,) = storage.list_names(checkpoints)
    metrics = json.loads(storage.read_bytes(f"{checkpoints}/{step}/chat.json"))["metrics"]
    return {name: round(value, 4) for name, value in metrics.items()}


def practised(home: str) -> dict[str, float]:
    metrics = json.loads(storage.read_bytes(f"{home}/runs/demo-rl/summary.json"))["metrics"]
    return {f"rl {when}": round(metrics[f"{when}/pass@1"], 4) for when in ("before", "after")}


def main() -> None:
    home = environment()["NANORAY_HOME"] + "-demo"
    shutil.rmtree(home, ignore_errors=True)
    seconds = {}
    for name, command in COMMANDS.items():
        start = time.monotonic()
        env = environment() | {"NANORAY_HOME": home}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=sys.stderr)
        seconds[name] = round(time.monotonic() - start, 1)
    summary = json.loads(storage.read_bytes(f"{home}/runs/demo/summary.json"))
    text = validation_text(home)
    result = {
        "bench": "demo",
        "total_s": round(sum(seconds.values()), 1),
        **seconds,
        "tokens_per_s": round(summary["tokens_per_s"]),
        "val_bpb": round(summary["val_bpb"], 4),
        "gzip_9_bpb": round(8 * len(gzip.compress(text, 9)) / len(text), 4),
        **chat_accuracies(home),
        **practised(home),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
