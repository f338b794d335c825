"""Weights as one buffer: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from engine_models import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.engine import Engine
from nanoray.errors import NanorayError
from nanoray.rl import flat

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_models_weights_come_back_from_a_read_only_buffer() -> None:
    state = dict(tiny().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"].bfloat16()
    buffer = flat.pack(state)
    assert buffer.dtype == np.uint8
    assert buffer.ndim == 1
    buffer.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = flat.unpack(buffer)
    assert_same(found, state)


def test_the_buffer_is_a_copy_and_what_is_unpacked_a_view() -> None:
    weight = torch.zeros(1000)
    buffer = flat.pack({"w": weight})
    weight.fill_(1)
    view = flat.unpack(buffer)["w"]
    assert not view.any()
    address = buffer.__array_interface__["data"][0]
    assert address <= view.data_ptr() < address + buffer.nbytes


@given(
    st.lists(
        st.tuples(
            st.text(max_size=8), st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)
        ),
        max_size=6,
        unique_by=lambda entry: entry[0],
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_any_names_dtypes_and_shapes(
    entries: list[tuple[str, torch.dtype, list[int]]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype, shape in entries
    }
    assert_same(flat.unpack(flat.pack(state)), state)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_what_is_no_such_buffer_is_refused(data: bytes) -> None:
    with pytest.raises(NanorayError, match="are not weights"):
        flat.unpack(np.frombuffer(data, dtype=np.uint8))


@pytest.mark.parametrize("missing", [1, 64, 5000])
def test_half_a_buffer_is_refused(missing: int) -> None:
    buffer = flat.pack({"a": torch.ones(3), "b": torch.ones(20, 64)})
    with pytest.raises(NanorayError, match="are not weights"):
        flat.unpack(buffer[:-missing])


def test_the_engine_refuses_other_shapes_and_keeps_its_weights() -> None:
    engine = Engine(tiny(), None)
    prompt = [[1, 2, 3, 4]]
    before = engine.score(prompt)
    with pytest.raises(NanorayError, match="do not fit"):
        engine.load_weights(flat.unpack(flat.pack(tiny(n_embd=32).state_dict())), version=1)
    assert engine.score(prompt) == before
    engine.load_weights(flat.unpack(flat.pack(tiny(seed=5).state_dict())), version=1)
    assert engine.score(prompt) == Engine(tiny(seed=5), None).score(prompt) != before
