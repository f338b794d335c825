"""Bits per byte: a validation loss that does not depend on the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TokenLosses = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def bits_and_bytes(
    token_losses: TokenLosses,
    rows: np.ndarray,
    token_bytes: np.ndarray,
    batch_rows: int,
    device: torch.device,
    trained: np.ndarray | None = None,
) -> tuple[float, int]:
    """Total bits that the model spends on the targets of ``rows``, and their bytes.

    Args:
        token_losses: (inputs [B, T], targets [B, T]) → losses [B, T] in nats.
        rows: [n, T+1] token ids. The last batch is filled up with rows that do not count, so
            that its shape is that of the others.
        token_bytes: [vocab] bytes of each token; tokens of no bytes (special ones) do not count.
        trained: [n, T+1], 0 where an id does not count as a target; None: all do.
    """
    table = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    nats = 0.0
    num_bytes = 0
    for start in range(0, len(rows), batch_rows):
        batch = torch.from_numpy(rows[start : start + batch_rows].astype(np.int64)).to(device)
        real = len(batch)
        if real < batch_rows:
            batch = torch.cat([batch, batch.new_zeros(batch_rows - real, batch.shape[1])])
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        losses = token_losses(inputs, targets)[:real]
        counted = table[targets[:real]]
        if trained is not None:
            counted *= torch.from_numpy(trained[start : start + real, 1:] > 0).to(device)
        counting = (losses.float() * (counted > 0)).cpu()  # MPS has no float64
        nats += float(counting.double().sum())
        num_bytes += int(counted.sum())
    return nats / math.log(2), num_bytes
