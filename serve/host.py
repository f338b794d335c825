"""The models of one replica: loaded, swapped for newer ones while they answer, let go.

Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanoray.checkpoint import find_checkpoint, step_dir
from nanoray.checkpoint.loading import LoadedModel, load_model
from nanoray.config.serve import ChatServiceConfig, ModelChoice
from nanoray.engine import Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer
from nanoray.tools.calculator import calculate
from serve.errors import UnknownModelError

_logger = logging.getLogger(__name__)
_CHAT_STAGES = ("sft", "rl")
# A request that has just been given an engine may not have reached it yet.
_IDLE_S = 5.0
_POLL_S = 0.1
_PROBE_TOKENS = 3  # two read, one written


@dataclass(frozen=True)
class ServedModel:
    """A model that answers.

    Attributes:
        name: what clients call it.
        engine: runs in a thread of its own.
        chat: whether it was tuned to chat; a base model only continues text.
        path, step: of the checkpoint that its weights are from.
        created: when they were loaded, in seconds since 1970.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    chat: bool
    path: str
    step: int
    created: int


@dataclass(frozen=True)
class _Shape:
    """What an engine keeps for life; all else is weights."""

    model_config: str
    tokenizer: str
    settings: tuple[Any, ...]


class Host:
    """Several models side by side, by name.

    A swap is atomic for callers: `model()` gives the old or the new, either of them whole. What
    was asked of an engine that is replaced is answered by it before it is closed.

    Args:
        drain_s: how long a replaced engine may take to finish its answers; None: as long as the
            config lets an answer take.

    Attributes:
        refused: why the latest config was not taken, if it was not.
    """

    def __init__(self, drain_s: float | None = None) -> None:
        self.refused: str | None = None
        self._drain_s = drain_s
        self._served: Mapping[str, ServedModel] = {}
        self._shapes: dict[str, _Shape] = {}
        self._draining: set[Engine] = set()
        self._changing = threading.Lock()

    def model(self, name: str | None) -> ServedModel:
        """The model of a name; the first one for None. Raises UnknownModelError."""
        served = self._served
        if name is None and served:
            return next(iter(served.values()))
        if name is None or name not in served:
            known = ", ".join(served) or "none yet"
            raise UnknownModelError(f"there is no model {name!r} here; the models are {known}")
        return served[name]

    def models(self) -> list[ServedModel]:
        """All models, the default one first."""
        return list(self._served.values())

    def stats(self) -> dict[str, Any]:
        """The engine's counters of each model (see Engine.stats), and where its weights are from.

        Engines that were replaced and still finish their answers are counted, not shown.
        """
        models = {
            name: {**served.engine.stats(), "step": served.step, "chat": served.chat}
            for name, served in self._served.items()
        }
        return {"models": models, "draining": len(self._draining), "refused": self.refused}

    def reconfigure(self, config: ChatServiceConfig) -> None:
        """Serve what `config` says; blocks until that is so.

        New weights are loaded and tried beside the old ones. Where only weights differ, the engine
        changes them between two of its steps, and no answer is cut; else a new engine takes the
        new requests. A model whose checkpoint and settings are the same is left alone; "the last
        step" is looked up anew.

        Raises:
            NanorayError: a checkpoint is missing, damaged or of no use; everything stays as it was.
        """
        with self._changing:
            # All that may fail comes before anything changes.
            planned = [self._plan(choice, config) for choice in config.models]
            for change in planned:
                change.load()
            # For the threads of new engines: one that has computed keeps the number it began with.
            torch.set_num_threads(config.num_threads)
            replaced = [change.commit() for change in planned]
            gone = [m.engine for name, m in self._served.items() if name not in _names(planned)]
            self._served = {change.choice.name: change.result for change in planned}
            self._shapes = {change.choice.name: change.shape for change in planned}
        _settle()
        drain_s = config.request_timeout_s if self._drain_s is None else self._drain_s
        for engine in [*gone, *filter(None, replaced)]:
            self._drain(engine, drain_s)

    async def health(self, deadline_s: float = 5.0) -> None:
        """Return if every engine computes. An idle one computes a token, a busy one must go on.

        Raises:
            NanorayError: one does not, within the deadline; or there is no model.
        """
        if not self._served:
            raise NanorayError("no model is loaded yet; wait, or see the log")
        await asyncio.gather(*(_check(m, deadline_s) for m in self.models()))

    def close(self) -> None:
        """Abort what runs, end all threads."""
        with self._changing:
            for served in self.models():
                served.engine.close()
            self._served, self._shapes = {}, {}

    def _plan(self, choice: ModelChoice, config: ChatServiceConfig) -> _Change:
        old = self._served.get(choice.name)
        return _Change(choice, config, old, self._shapes.get(choice.name))

    def _drain(self, engine: Engine, drain_s: float) -> None:
        self._draining.add(engine)
        threading.Thread(target=self._close_when_idle, args=(engine, drain_s), daemon=True).start()

    def _close_when_idle(self, engine: Engine, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        idle_since = time.monotonic()
        while (now := time.monotonic()) < deadline and now - idle_since < _IDLE_S:
            stats = engine.stats()
            if stats["running"] or stats["waiting"]:
                idle_since = now
            time.sleep(_POLL_S)
        engine.close()
        self._draining.discard(engine)
        del engine
        _settle()


def _settle() -> None:
    """Take what is there for lasting: looking through it for garbage stops all streams for 150 ms.

    What an earlier call took for lasting and nobody uses any more is let go.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def _check(served: ServedModel, deadline_s: float) -> None:
    """Under load a probe would wait its turn behind everybody: there, progress is proof."""
    enough = _computed(served.engine) + _PROBE_TOKENS
    probe = asyncio.ensure_future(_probe(served))
    try:
        async with asyncio.timeout(deadline_s):
            while not probe.done():
                if _computed(served.engine) > enough:
                    return
                await asyncio.wait([probe], timeout=_POLL_S)
        await probe
    except TimeoutError:
        raise NanorayError(
            f"the engine of model {served.name} computed nothing for {deadline_s:g} s; "
            f"restart this replica"
        ) from None
    finally:
        probe.cancel()
        with contextlib.suppress(asyncio.CancelledError, NanorayError):
            await probe


def _computed(engine: Engine) -> float:
    """Tokens read and written so far."""
    stats = engine.stats()
    return stats["generated_tokens"] + stats["computed_prefill_tokens"]


async def _probe(served: ServedModel) -> None:
    """One token. Raises NanorayError if none comes."""
    bos = served.tokenizer.bos_id
    # Two, so that the slot of the last probe is found again, and no conversation's is taken.
    stream = served.engine.stream([bos, bos], SamplingParams(temperature=0, max_tokens=1))
    async with contextlib.aclosing(stream):
        async for delta in stream:
            if delta.error:
                raise NanorayError(f"model {served.name} cannot answer: {delta.error}")


class _Change:
    """One model's way from what is served to what shall be: load(), which may fail, commit()."""

    def __init__(
        self,
        choice: ModelChoice,
        config: ChatServiceConfig,
        old: ServedModel | None,
        old_shape: _Shape | None,
    ) -> None:
        self.choice = choice
        self.shape: _Shape
        self.result: ServedModel
        self._config, self._old, self._old_shape = config, old, old_shape
        self._loaded: LoadedModel | None = None
        self._new: ServedModel | None = None

    def load(self) -> None:
        """Bring in all that is needed. Raises NanorayError."""
        config = self._config
        root, step = find_checkpoint(self.choice.run, self.choice.step)
        sizes = (config.num_slots, config.max_len, config.prefill_chunk)
        settings = (*sizes, config.dtype, config.num_threads)
        same_path = self._old is not None and self._old.path == step_dir(root, step)
        if same_path and self._old_shape is not None and self._old_shape.settings == settings:
            self.shape = self._old_shape
            return
        loaded = load_model(self.choice.run, step, dtype=config.dtype)
        _try_out(loaded)
        self._loaded = loaded
        self.shape = _Shape(
            repr(sorted(loaded.model.config.to_dict().items())),
            loaded.tokenizer.fingerprint,
            settings,
        )
        if self.shape != self._old_shape:
            self._new = self._make()

    def commit(self) -> Engine | None:
        """Put it to use; the engine that is replaced, if there is one."""
        if self._loaded is None:
            assert self._old is not None
            self.result = self._old
            return None
        if self._new is not None:
            self.result = self._new
            self.result.engine.start()
            return self._old.engine if self._old else None
        old, loaded = self._old, self._loaded
        assert old is not None
        version = int(old.engine.stats()["version"]) + 1
        old.engine.load_weights(loaded.model.state_dict(), version)
        self.result = replace(
            old,
            chat=_chats(loaded),
            path=loaded.path,
            step=loaded.step,
            created=int(time.time()),
        )
        return None

    def _make(self) -> ServedModel:
        loaded, config = self._loaded, self._config
        assert loaded is not None
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            num_slots=config.num_slots,
            max_len=config.max_len,
            prefill_chunk=config.prefill_chunk,
            tool=calculate,
        )
        return ServedModel(
            name=self.choice.name,
            engine=engine,
            tokenizer=loaded.tokenizer,
            chat=_chats(loaded),
            path=loaded.path,
            step=loaded.step,
            created=int(time.time()),
        )


def _names(changes: Sequence[_Change]) -> set[str]:
    return {change.choice.name for change in changes}


def _chats(loaded: LoadedModel) -> bool:
    return loaded.meta.get("stage") in _CHAT_STAGES


def _try_out(loaded: LoadedModel) -> None:
    """Weights may be read without fault and yet be of no use: a run that diverged."""
    bos = torch.tensor([[loaded.tokenizer.bos_id]], device=loaded.model.wte.weight.device)
    with torch.inference_mode():
        logits_BTV = loaded.model(bos)
    if not logits_BTV.isfinite().all():
        raise NanorayError(
            f"the model of {loaded.path} gives no finite logits: its weights have diverged; "
            f"take an earlier step"
        )
