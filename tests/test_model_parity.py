"""Logits and gradients equal nanochat's reference numbers, July and February."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT, detect_recipe

PARITY = Path(__file__).parents[1].parent / "shared" / "data" / "parity"
NAMES = ["july_mha", "july_gqa", "february_mha", "february_gqa"]

pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason=f"no reference numbers in {PARITY}")


def load(name: str) -> tuple[GPT, dict[str, torch.Tensor], dict]:
    reference = json.loads((PARITY / f"{name}.json").read_text())
    tensors = load_file(PARITY / f"{name}.safetensors")
    weights = {
        f"_orig_mod.{key.removeprefix('before/')}": tensor
        for key, tensor in tensors.items()
        if key.startswith("before/")
    }
    assert detect_recipe(weights) == reference["version"]
    model = GPT(GPTConfig(**reference["config"], recipe=reference["version"]))
    model.load_state_dict({key.removeprefix("_orig_mod."): t for key, t in weights.items()})
    return model, tensors, reference


@pytest.mark.parametrize("name", NAMES)
def test_config_counts_as_nanochat(name: str) -> None:
    model, _, reference = load(name)
    assert model.config.num_parameters_by_group() == reference["param_counts"]
    assert model.config.flops_per_token() == reference["flops_per_token"]
    assert sum(p.numel() for p in model.parameters()) == reference["param_counts"]["total"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_losses_and_gradients_are_nanochats(name: str) -> None:
    model, tensors, reference = load(name)
    idx_BT, targets_BT = tensors["tokens"][0].long(), tensors["targets"][0].long()

    torch.testing.assert_close(model(idx_BT), tensors["logits0"], rtol=0, atol=1e-5)
    with torch.no_grad():
        losses_BT = model(idx_BT, targets_BT, reduction="none")
    torch.testing.assert_close(losses_BT, tensors["loss_rows0"], rtol=0, atol=1e-5)

    loss = model(idx_BT, targets_BT) / (targets_BT != -1).sum()
    assert loss.item() == pytest.approx(reference["losses"][0], abs=1e-5)
    loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, tensors[f"grad0/{key}"], rtol=0, atol=1e-5, msg=lambda m, k=key: k + m
        )
