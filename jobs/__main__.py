"""``python -m jobs``: the list of jobs."""

from __future__ import annotations

JOBS = {
    "data": "download, build, repackage or inspect a corpus",
    "tokenizer": "train a tokenizer, or compare it with others",
    "pretrain": "pretrain a model from scratch, or go on with a run",
    "sft": "fine-tune a base model on conversations",
    "rl": "practise a task by reinforcement learning; status and scale of a running one",
    "eval": "bits per byte, samples, CORE, chat tasks, speed of a checkpoint",
    "status": "every run and live job: step, loss, speed, last sign of life",
    "chat": "talk to a model in the terminal",
    "serve": "chat over HTTP: an OpenAI-compatible API and a page",
}


def main() -> None:
    print("python -m jobs.<name> --help tells a job's flags. The jobs:\n")
    for name, what in JOBS.items():
        print(f"  {name:<10} {what}")


if __name__ == "__main__":
    main()
