"""The Grafana dashboards: one table of panels for each, from which cluster/grafana/*.json is made.

    python cluster/dashboards.py            # names the files that differ from the tables
    python cluster/dashboards.py --write    # writes them

Grafana imports the files as they are; choose the Prometheus of cluster/prometheus.yml at the top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "grafana"
SCHEMA_VERSION = 39  # Grafana 11; newer ones migrate it
COLUMNS, WIDTH, HEIGHT = 24, 8, 8  # of Grafana's grid, and of a panel in it
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A graph over time.

    Attributes:
        unit: one of Grafana's (``s``, ``percentunit``, ``short``, …).
        queries: PromQL by what the legend says.
    """

    title: str
    unit: str
    queries: dict[str, str]
    description: str


@dataclass(frozen=True)
class Dashboard:
    """What a file is made of.

    Attributes:
        uid: stable, and so are links to it.
        variable: the label that is chosen at the top, such as ``run``.
        metric: one that has this label.
        rows: panels by the row's title.
    """

    uid: str
    title: str
    variable: str
    metric: str
    rows: dict[str, tuple[Panel, ...]]


def _of(stages: str, keys: str) -> dict[str, str]:
    """The gauges of these keys in these stages, the newest worker's where a run has two."""
    return {
        f"{key} {stage} {{{{run}}}}": f'max by (run) (ray_nanoray_{stage}_{key}{{run=~"$run"}})'
        for stage in stages.split()
        for key in keys.split()
    }


def _train(title: str, unit: str, keys: str, description: str) -> Panel:
    return Panel(title, unit, _of("pretrain sft", keys), description)


def _rl(title: str, unit: str, keys: str, description: str) -> Panel:
    return Panel(title, unit, _of("rl", keys), description)


def _quantiles(title: str, metric: str, description: str) -> Panel:
    queries = {
        f"p{percent} {{{{model}}}}": f"histogram_quantile(0.{percent}, sum by (le, model) (rate("
        f'ray_nanoray_{metric}_seconds_bucket{{model=~"$model"}}{_RATE})))'
        for percent in (50, 95, 99)
    }
    return Panel(title, "s", queries, description)


def _rate(metric: str, by: str) -> str:
    return f'sum by ({by}) (rate(ray_nanoray_{metric}_total{{model=~"$model"}}{_RATE}))'


def _engines(metric: str) -> dict[str, str]:
    return {"{{model}}": f'sum by (model) (ray_nanoray_{metric}{{model=~"$model"}})'}


TRAINING = Dashboard(
    uid="nanoray-training",
    title="nanoray: pretraining and fine-tuning",
    variable="run",
    metric='{__name__=~"ray_nanoray_(pretrain|sft)_step"}',
    rows={
        "Learning": (
            _train("Loss", "none", "loss", "Mean over the target tokens of a step, nats."),
            _train("Validation", "none", "val_bpb", "Bits per byte on the validation split."),
            Panel(
                "ChatCORE", "none", _of("sft", "chatcore"), "Mean of the tasks' centred accuracies."
            ),
            _train("Learning rate", "none", "lr_multiplier", "Factor on all learning rates."),
        ),
        "Speed": (
            _train("Tokens a second", "short", "tokens_per_s", "Over all workers."),
            _train("MFU", "percentunit", "mfu", "FLOP/s of the model over the devices' peak."),
            _train("Steps done", "short", "step", "A flat line is a run that does not move."),
            _train("Time left", "s", "eta_s", "By the median of the last 20 steps."),
            _train("Tokens", "short", "tokens", "Trained on since the run began."),
            _train("Epoch", "none", "epoch", "Of the corpus, or of the mixture."),
        ),
        "Where the time goes": (
            _train("Step", "s", "step_s", "The whole step, data and all."),
            _train(
                "Waiting for data",
                "s",
                "data_wait_s",
                "Near zero while packing keeps up; else give the data tasks more CPUs.",
            ),
            _train(
                "Phases of a step",
                "s",
                "forward_backward_s optimizer_s",
                "The optimiser's part holds the communication between workers.",
            ),
            _train("Checkpoint", "s", "checkpoint_s", "The last save, beside training."),
            _train("Evaluation", "s", "eval_s", "The last one; training waits for it."),
            _train(
                "Documents left out",
                "short",
                "documents_skipped tokens_cropped",
                "What bad data and packing cost since the run began.",
            ),
        ),
    },
)

RL = Dashboard(
    uid="nanoray-rl",
    title="nanoray: reinforcement learning",
    variable="run",
    metric="ray_nanoray_rl_step",
    rows={
        "Learning": (
            _rl("Reward", "none", "reward reward_std", "Of the answers of a step."),
            _rl("pass@1", "percentunit", "pass_1", "On held-out problems."),
            _rl(
                "Problems solved",
                "percentunit",
                "solved_none solved_some solved_all",
                "By none, some or all of their answers; only some teaches.",
            ),
            _rl("Length of answers", "short", "response_length response_length_max", "Tokens."),
            _rl(
                "Answers cut",
                "percentunit",
                "response_clipped",
                "At the limit of --max-new-tokens.",
            ),
            _rl(
                "Rewards that went wrong",
                "short",
                "reward_problems",
                "Of a step: timed out, crashed or raised. They count as 0.",
            ),
        ),
        "Policy": (
            _rl("Loss", "none", "loss", "Of the policy; says little by itself."),
            _rl("Entropy", "none", "entropy", "Of the sampled tokens, nats; a collapse is bad."),
            _rl("Gradient norm", "none", "grad_norm", "Over all workers."),
            _rl("Clipped", "percentunit", "clip_fraction", "Share of tokens outside the range."),
            _rl("Ratio and effective sample size", "none", "ratio_mean ess", "1 is on policy."),
            _rl("Mismatch", "none", "mismatch_kl", "Learner against sampler, nats a token."),
        ),
        "Keeping step": (
            _rl("Staleness", "short", "staleness staleness_max", "Versions behind the learner."),
            _rl(
                "Idle",
                "percentunit",
                "learner_idle rollout_idle",
                "Learner high: more rollout actors. Rollouts high: fewer.",
            ),
            _rl(
                "Groups lost",
                "short",
                "groups_dropped groups_redispatched groups_filtered",
                "Too old, sampled again after a loss, without a gradient; of the whole run.",
            ),
            Panel(
                "Queue",
                "short",
                _of("rollouts", "groups_waiting groups_in_flight") | _of("rl", "groups_done"),
                "Groups that wait for an actor, are sampled, wait for the learner.",
            ),
            Panel(
                "Rollout actors",
                "short",
                _of("rollouts", "actors_wanted actors_starting actors_idle actors_busy"),
                "Wanted, and what they do.",
            ),
            _rl("Actors lost", "short", "actors_lost", "In this job; each was replaced."),
        ),
        "Speed": (
            _rl("Tokens a second", "short", "rollout_tokens_per_s learner_tokens_per_s", "Each."),
            _rl(
                "Phases of a step",
                "s",
                "wait_for_batch_s forward_backward_s optimizer_s broadcast_s",
                "Of the learner.",
            ),
            _rl(
                "Rollouts wait",
                "s",
                "wait_for_policy_s weights_fetch_s",
                "For work, an actor's mean since the last step; and for new weights to arrive.",
            ),
            _rl("Step", "s", "step_s", "The learner's, waiting and all."),
            _rl("Checkpoint and evaluation", "s", "checkpoint_s eval_s", "The last ones."),
            _rl("Time left", "s", "eta_s", "By the median of the last 20 steps."),
        ),
    },
)

SERVING = Dashboard(
    uid="nanoray-serving",
    title="nanoray: serving",
    variable="model",
    metric="ray_nanoray_num_requests_running",
    rows={
        "Latency": (
            _quantiles("Time to first token", "time_to_first_token", "From the request's arrival."),
            _quantiles("Between tokens", "inter_token_latency", "An answer's mean."),
            _quantiles("Whole answer", "e2e_request_latency", "From arrival to end."),
            _quantiles("In the queue", "request_queue_time", "Until the engine has a slot."),
        ),
        "Load": (
            Panel(
                "Requests a second",
                "reqps",
                {
                    "{{model}} {{finished_reason}}": _rate(
                        "request_success", "model, finished_reason"
                    )
                },
                "Answered, by how they ended.",
            ),
            Panel(
                "Failures a second",
                "reqps",
                {"{{model}} {{status}}": _rate("request_failure", "model, status")},
                "By HTTP status: 429 the queue is full, 499 the client has left, 5xx ours.",
            ),
            Panel(
                "Tokens a second",
                "short",
                {
                    "prompt {{model}}": _rate("prompt_tokens", "model"),
                    "generated {{model}}": _rate("generation_tokens", "model"),
                },
                "Over all replicas.",
            ),
        ),
        "Engines": (
            Panel("Running", "short", _engines("num_requests_running"), "Sequences in slots."),
            Panel("Waiting", "short", _engines("num_requests_waiting"), "Sequences without one."),
            Panel(
                "Cache in use",
                "percentunit",
                {"{{model}}": 'max by (model) (ray_nanoray_kv_cache_usage_perc{model=~"$model"})'},
                "By running sequences, of the fullest replica.",
            ),
            Panel(
                "Prefix cache",
                "percentunit",
                {
                    "{{model}}": f"{_rate('prefix_cache_hits', 'model')} / "
                    f"{_rate('prefix_cache_queries', 'model')}"
                },
                "Share of prompt tokens found in the cache.",
            ),
            Panel(
                "Config refused",
                "short",
                {"replicas": "sum(ray_nanoray_config_refused)"},
                "Replicas that refuse the newest config and serve the one before.",
            ),
        ),
    },
)

DASHBOARDS = {"training": TRAINING, "rl": RL, "serving": SERVING}


def make(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard in Grafana's JSON model."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["nanoray", "ray"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_data_source(), _choice(dashboard)]},
        "panels": _panels(dashboard),
    }


def _panels(dashboard: Dashboard) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in dashboard.rows.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        row = {"type": "row", "title": title, "collapsed": False, "panels": []}
        made.append({"id": len(made) + 1, "gridPos": place} | row)
        y += 1
        for number, panel in enumerate(panels):
            line, column = divmod(number, COLUMNS // WIDTH)
            place = {"x": column * WIDTH, "y": y + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            made.append({"id": len(made) + 1, "gridPos": place} | _graph(panel))
        y += -(-len(panels) * WIDTH // COLUMNS) * HEIGHT
    return made


def _graph(panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": name}
            for i, (name, query) in enumerate(panel.queries.items())
        ],
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _choice(dashboard: Dashboard) -> dict[str, Any]:
    query = f"label_values({dashboard.metric}, {dashboard.variable})"
    return {
        "name": dashboard.variable,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": query,
        "definition": query,
        "refresh": 2,  # when the range of time changes, too
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def files() -> dict[Path, str]:
    """What is to stand in each file."""
    return {
        FOLDER / f"{name}.json": json.dumps(make(dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def main(argv: Sequence[str]) -> int:
    if argv not in ([], ["--write"]):
        print("usage: python cluster/dashboards.py [--write]", file=sys.stderr)
        return 2
    stale = [p for p, text in files().items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if argv:
            path.write_text(files()[path])
        print(f"{'written' if argv else 'differs'}: {path.name}")
    return 1 if stale and not argv else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
