"""Weights as one flat buffer, so that a broadcast is one object, however many parameters there are.

Layout: 8 bytes with the header's length (little-endian), the header, then the tensors' bytes, each
from a multiple of 64 on. The header is JSON, ``[[name, dtype, shape, first byte], ...]``; byte 0 is
where the first tensor begins. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoray.errors import NanorayError

_ALIGNMENT = 64  # of a cache line, and more than any dtype needs for its view
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def pack(state_dict: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """A copy of all tensors, of any device, as one array uint8 [bytes]."""
    entries: list[tuple[str, str, list[int], int]] = []
    end = 0
    for name, tensor in state_dict.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert dtype in _DTYPES, f"{name} is {dtype}"
        start = _aligned(end)
        entries.append((name, dtype, list(tensor.shape), start))
        end = start + tensor.numel() * tensor.itemsize
    header = json.dumps(entries).encode()
    first = _aligned(8 + len(header))
    flat = torch.empty(first + end, dtype=torch.uint8)
    flat.numpy()[:8] = np.frombuffer(len(header).to_bytes(8, "little"), dtype=np.uint8)
    flat.numpy()[8 : 8 + len(header)] = np.frombuffer(header, dtype=np.uint8)
    flat.numpy()[8 + len(header) : first] = 0
    for (_, dtype, shape, start), tensor in zip(entries, state_dict.values()):
        _view(flat[first:], _DTYPES[dtype], shape, start).copy_(tensor.detach())
    return flat.numpy()


def unpack(flat: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Views of the tensors in the buffer: read them, copy them, never write to them.

    What comes out of Ray's object store is shared between processes and read-only; torch does not
    know read-only tensors, and a write would end the process.

    Raises:
        NanorayError: this is no such buffer, or not all of one.
    """
    try:
        length = int.from_bytes(flat[:8].tobytes(), "little")
        entries = json.loads(flat[8 : 8 + length].tobytes())
        first = _aligned(8 + length)
        with warnings.catch_warnings():  # that it is not writable
            warnings.simplefilter("ignore", UserWarning)
            data = torch.from_numpy(flat[first:])
        return {
            name: _view(data, _DTYPES[dtype], shape, start) for name, dtype, shape, start in entries
        }
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, MemoryError) as error:
        raise NanorayError(
            f"these {len(flat):,} bytes are not weights as flat.pack makes them "
            f"({type(error).__name__}); publish what it returns, whole"
        ) from error


def _view(data: Tensor, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
    stop = start + math.prod(shape) * dtype.itemsize
    return data[start:stop].view(dtype).view(shape)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
