"""Prometheus' configuration and the alert rules: each is raised by its fault and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"
ALERTS = CLUSTER / "alerts.yml"

promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool (apt-get install prometheus)"
)


def run_promtool(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=60)


@promtool
def test_promtool_takes_the_configuration_and_the_rules() -> None:
    for command, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = run_promtool("check", command, str(CLUSTER / file))
        assert done.returncode == 0, done.stdout + done.stderr


# Series in promtool's notation, a value a minute: a+bxn is n steps of b from a, _ a missing one,
# stale what Prometheus writes when a target has a series no more.
HEALTHY = {
    'ray_nanoray_pretrain_step{run="a"}': "0+10x60",
    'ray_nanoray_pretrain_not_finite{run="a"}': "0+0x60",
    'ray_nanoray_pretrain_eta_s{run="a"}': "3600-60x60",
    'ray_nanoray_rl_learner_idle{run="b"}': "0.5+0x60",
    'ray_nanoray_rollouts_actors_wanted{run="b"}': "4+0x60",
    'ray_nanoray_rollouts_actors_idle{run="b"}': "1+0x60",
    'ray_nanoray_rollouts_actors_busy{run="b"}': "3+0x60",
    'ray_nanoray_request_success_total{model="m",finished_reason="stop"}': "0+600x60",
    'ray_nanoray_request_failure_total{model="m",status="429"}': "0+600x60",
    'ray_nanoray_request_failure_total{model="m",status="500"}': "0+6x60",
    'ray_nanoray_config_refused{WorkerId="1"}': "0+0x60",
    'ray_nanoray_config_refused{WorkerId="2"}': "0+0x60",
}
CASES = {
    "all is well": ({}, set()),
    "a run has just begun": ({'ray_nanoray_sft_step{run="c"}': "_x55 0+0x5"}, set()),
    "a run finishes": (
        {
            'ray_nanoray_pretrain_step{run="a"}': "0+10x40",
            'ray_nanoray_pretrain_eta_s{run="a"}': "2400-60x40",
        },
        set(),
    ),
    "a run finishes, and is long at its last evaluation": (
        {
            'ray_nanoray_pretrain_step{run="a"}': "0+10x20 200+0x5 stale",
            'ray_nanoray_pretrain_eta_s{run="a"}': "1200-60x20 0+0x5 stale",
        },
        set(),
    ),
    "workers restart, and the run finishes": (
        {
            'ray_nanoray_pretrain_step{run="a"}': "_x60",
            'ray_nanoray_pretrain_eta_s{run="a"}': "_x60",
            'ray_nanoray_pretrain_step{run="a",WorkerId="1"}': "0+10x20 stale",
            'ray_nanoray_pretrain_eta_s{run="a",WorkerId="1"}': "2400-60x20 stale",
            'ray_nanoray_pretrain_step{run="a",WorkerId="2"}': "_x22 200+20x11 stale",
            'ray_nanoray_pretrain_eta_s{run="a",WorkerId="2"}': "_x22 660-60x11 stale",
        },
        set(),
    ),
    "no steps": ({'ray_nanoray_pretrain_step{run="a"}': "0+10x40 400+0x20"}, {"TrainingStalled"}),
    "killed": (
        {
            'ray_nanoray_pretrain_step{run="a"}': "0+10x45",
            'ray_nanoray_pretrain_eta_s{run="a"}': "3600-60x45",
        },
        {"TrainingEndedEarly"},
    ),
    "NaN, and the end": (
        {
            'ray_nanoray_pretrain_not_finite{run="a"}': "0+0x55 1+0x0",
            'ray_nanoray_pretrain_step{run="a"}': "0+10x56",
            'ray_nanoray_pretrain_eta_s{run="a"}': "3600-60x56",
        },
        {"NotANumber"},
    ),
    "starved": ({'ray_nanoray_rl_learner_idle{run="b"}': "0.97+0x60"}, {"RolloutStarvation"}),
    "actors lost": (
        {'ray_nanoray_rollouts_actors_busy{run="b"}': "3+0x40 1+0x20"},
        {"RolloutActorsMissing"},
    ),
    "errors": (
        {'ray_nanoray_request_failure_total{model="m",status="500"}': "0+150x60"},
        {"ServingErrors"},
    ),
    "a config is refused for a moment": (
        {'ray_nanoray_config_refused{WorkerId="2"}': "0+0x40 1+0x1 0+0x17"},
        set(),
    ),
    "a config is refused": (
        {'ray_nanoray_config_refused{WorkerId="2"}': "0+0x40 1+0x20"},
        {"ServingConfigRefused"},
    ),
    "nothing but errors": (
        {
            'ray_nanoray_request_success_total{model="m",finished_reason="stop"}': "_x60",
            'ray_nanoray_request_failure_total{model="m",status="429"}': "_x60",
        },
        {"ServingErrors"},
    ),
}


@promtool
@pytest.mark.parametrize("case", CASES)
def test_an_alert_is_raised_by_its_fault_and_by_nothing_else(case: str, tmp_path: Path) -> None:
    changes, alarms = CASES[case]
    names = [
        rule["alert"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    ]
    assert alarms <= set(names)
    series = [{"series": name, "values": v} for name, v in (HEALTHY | changes).items()]
    # promtool wants the labels and texts of what it expects: ask for the state of alerts instead.
    # What is raised is so at the end; the others are so never.
    checks = [
        {
            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": int(name in alarms)}],
        }
        for name in names
        for minute in ([58] if name in alarms else range(59))
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": checks}
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]})
    )
    done = run_promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
