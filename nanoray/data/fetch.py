"""One file over HTTP, come what may: resumed by byte range, retried, verified, published whole."""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import tenacity
from filelock import FileLock, Timeout

from nanoray import storage
from nanoray.data.shards import BadShardError, check_schema, open_shard
from nanoray.data.writer import write_errors
from nanoray.errors import NanorayError

# What a cut connection loses, and how often an interrupt is noticed.
_CHUNK_BYTES = 16 << 10
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
# done bytes, total bytes (None: unknown)
Observer = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Patience:
    """How long to try. Seconds are of one connection, one wait, one lock.

    Attributes:
        attempts: failures in a row, without a new byte, before giving up.
        bodies: damaged bodies before giving up.
        retry_after_max_s: the longest wait that a server may ask for.
    """

    attempts: int = 8
    bodies: int = 3
    connect_s: float = 10.0
    read_s: float = 30.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    retry_after_max_s: float = 300.0
    lock_s: float = 3600.0


class Stopped(Exception):  # noqa: N818
    """Another shard failed for good, or the user interrupted."""


class _Retry(Exception):  # noqa: N818
    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.failures = 1


class FileFetch:
    """Fetches ``url`` to ``uri``, keeping ``NAME.part`` and ``NAME.json`` (its ETag and size) in
    ``aside`` between attempts and between runs.

    Raises (from `run`):
        NanorayError: the server does not have it, keeps failing or keeps sending a damaged file,
            there is no room or no permission, or another job holds it for too long.
        Stopped: ``stop`` was set.
    """

    def __init__(
        self,
        url: str,
        uri: str,
        aside: Path,
        patience: Patience,
        stop: threading.Event,
        observe: Observer,
        note: Callable[[str], None],
    ) -> None:
        self.url, self.uri = url, uri
        self.name = uri.rsplit("/", 1)[-1]
        self.part = aside / f"{self.name}.part"
        self.meta = aside / f"{self.name}.json"
        self.patience = patience
        self._stop, self._observe, self._note = stop, observe, note
        self._lock = FileLock(aside / f"{self.name}.lock")
        self._most_bytes = 0
        self._failures = 0
        self._damaged_bodies = 0

    def run(self) -> bool:
        """Fetch the file unless it is there and whole; True if it was fetched here."""
        if self._is_published():
            return False
        with write_errors(self.uri), self._locked():
            if self._is_published():  # by the job that held the lock
                return False
            self._most_bytes = self._part_bytes()
            self._retrying()(self._attempt)
            self._publish()
        return True

    def _is_published(self) -> bool:
        if not storage.exists(self.uri):
            return False
        try:
            with open_shard(self.uri) as file:
                return file.metadata.num_row_groups > 0
        except BadShardError as error:
            self._note(f"{self.name}: {error.kind}, fetched again")
            return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + self.patience.lock_s
        while True:
            self._check_stop()
            try:
                self._lock.acquire(timeout=0.5)
                break
            except Timeout:
                if time.monotonic() > deadline:
                    raise NanorayError(
                        f"waited {self.patience.lock_s:.0f} s for another job that is fetching "
                        f"{self.name} (it holds {self._lock.lock_file}); end that job and try again"
                    ) from None
        try:
            yield
        finally:
            self._lock.release()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _retrying(self) -> tenacity.Retrying:
        patience = self.patience

        def wait(state: tenacity.RetryCallState) -> float:
            error = _retry_of(state)
            backoff = patience.backoff_s * 2 ** min(error.failures - 1, 30)
            jitter = random.uniform(0, patience.backoff_s)
            asked = min(error.wait_s, patience.retry_after_max_s)
            return max(min(backoff, patience.backoff_max_s) + jitter, asked)

        def note(state: tenacity.RetryCallState) -> None:
            pause = state.next_action.sleep if state.next_action else 0.0
            self._note(f"{self.name}: {_retry_of(state)}; again in {pause:.1f} s")

        def give_up(state: tenacity.RetryCallState) -> None:
            raise NanorayError(
                f"{self.url} could not be fetched: {_retry_of(state)}, and {patience.attempts} "
                f"attempts in a row brought nothing new; run the command again to go on from where "
                f"it stopped, or try another --base-url"
            )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            stop=lambda state: _retry_of(state).failures >= patience.attempts,
            wait=wait,
            sleep=tenacity.sleep_using_event(self._stop),
            before_sleep=note,
            retry_error_callback=give_up,
        )

    def _attempt(self) -> None:
        self._check_stop()
        try:
            self._transfer()
            self._verify()
        except _CUT as error:
            raise self._counted(_Retry(f"the connection failed ({_first_line(error)})")) from error
        except _Retry as error:
            raise self._counted(error) from error.__cause__
        except requests.RequestException as error:
            raise NanorayError(
                f"{self.url} cannot be fetched ({_first_line(error)}); check --base-url"
            ) from error

    def _counted(self, error: _Retry) -> _Retry:
        """Give the error its number among the failures since the last new byte."""
        progress = self._part_bytes() > self._most_bytes
        self._most_bytes = max(self._most_bytes, self._part_bytes())
        self._failures = 1 if progress else self._failures + 1
        error.failures = self._failures
        return error

    def _transfer(self) -> None:
        """Bring the part to its full length, or raise."""
        have, known = self._part_bytes(), self._read_meta()
        if not known or (known["size"] is not None and have > known["size"]):
            self._drop()
            have, known = 0, {}
        if have and have == known["size"]:
            return
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if (known["etag"] or "").startswith('"'):  # a weak one may not be compared so
                headers["If-Range"] = known["etag"]
        timeout = (self.patience.connect_s, self.patience.read_s)
        with requests.get(self.url, headers=headers, stream=True, timeout=timeout) as response:
            if have and response.status_code == 416:
                total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
                if not total or int(total[1]) != have:
                    self._drop()
                    raise _Retry("the file on the server is shorter than before")
                return
            _check_status(response)
            self._receive(response, have, known)

    def _receive(self, response: requests.Response, have: int, known: dict) -> None:
        etag = response.headers.get("ETag")
        if response.status_code == 206:
            span = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            changed = bool(etag and known.get("etag") and etag != known["etag"])
            if not span or int(span[1]) != have or changed:
                self._drop()
                raise _Retry("the server sent another range or another file than asked for")
            size = int(span[2]) if span[2] != "*" else known["size"]
            if known["size"] not in (None, size):
                self._drop()
                raise _Retry("the file on the server has changed")
        else:  # a whole body: the first, or from a server that ignores ranges
            have = 0
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else None
            self.meta.write_text(json.dumps({"etag": etag, "size": size, "url": self.url}))
        with open(self.part, "ab" if have else "wb", buffering=0) as file:
            self._observe(have, size)
            for chunk in response.iter_content(_CHUNK_BYTES):
                self._check_stop()
                file.write(chunk)
                have += len(chunk)
                self._observe(have, size)
            os.fsync(file.fileno())
        if size is not None and have < size:
            raise _Retry(f"the connection ended at byte {have:,} of {size:,}")

    def _verify(self) -> None:
        """Decode everything once: a byte range glued wrongly shows nowhere else."""
        size = (self._read_meta() or {}).get("size")
        try:
            if size is not None and self._part_bytes() != size:
                raise BadShardError(f"it has {self._part_bytes()} bytes, not {size}", "damaged")
            with open_shard(str(self.part)) as file:
                check_schema(str(self.part), file.schema_arrow)
                for _batch in file.iter_batches(columns=["text"]):
                    self._check_stop()
        except BadShardError as error:
            self._drop()
            self._damaged_bodies += 1
            if self._damaged_bodies >= self.patience.bodies:
                raise NanorayError(
                    f"{self.url} was fetched {self._damaged_bodies} times and is no whole parquet "
                    f"shard ({error.reason}); try later or another --base-url"
                ) from error
            raise _Retry(f"the body is damaged ({error.reason})") from error

    def _publish(self) -> None:
        with storage.explained(
            f"{self.uri} could not be uploaded",
            "check NANORAY_HOME and run the command again",
            OSError,
        ):
            storage.upload(self.part, self.uri)
        self._drop()

    def _part_bytes(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def _read_meta(self) -> dict:
        """``{"etag", "size", "url"}`` of the part; empty where there is none that can be used."""
        try:
            meta = json.loads(self.meta.read_text())
            return meta if meta["url"] == self.url and {"etag", "size"} <= set(meta) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _drop(self) -> None:
        for path in (self.part, self.meta):
            path.unlink(missing_ok=True)


def _retry_of(state: tenacity.RetryCallState) -> _Retry:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _Retry)
    return error


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in _RETRIED_STATUS:
        raise _Retry(f"the server answered {status}", retry_after_s(response.headers))
    mend = "check --base-url and --num-shards" if status in (404, 410) else "check --base-url"
    raise NanorayError(f"{response.url} answered {status} {response.reason}; {mend}")


def retry_after_s(headers: requests.structures.CaseInsensitiveDict[str]) -> float:
    """Seconds that a ``Retry-After`` header asks for (a number or a date), else 0."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
