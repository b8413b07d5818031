"""Which server is meant: the one that PREFECT_API_URL names, or the dataset's own service."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.environment import quiet_prefect
from pipeline.errors import HeadcastError, StageError, Unavailable, UserError

HOME = ".prefect"
"""Where in a dataset its service keeps its database and logs."""
RECORD = "serve.json"


def read_record(data: Path) -> dict[str, Any] | None:
    """What the service of a dataset wrote down about itself; None where there is none."""
    try:
        record = json.loads((data / HOME / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("url"), str) else None


@contextlib.contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Hold the lock of a dataset's service, which the kernel frees when this process ends.

    Raises:
        UserError: another service has it.
    """
    with open(data / HOME / "serve.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            first = read_record(data) or {}
            raise UserError(
                f"'{data}' is served already: {first.get('page', 'just starting')}, "
                f"process {first.get('pid', 'unknown')} on {first.get('host', 'this machine')}.",
                "use that one, or stop it first",
            ) from None
        yield


def is_healthy(url: str, seconds: float) -> bool:
    """Whether a server answers."""
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=seconds).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def connect(data: Path) -> Iterator[Any]:
    """A client of the server that PREFECT_API_URL names, or else of the dataset's own service.

    Raises:
        UserError: the URL is none.
        Unavailable: nothing answers there, or no service runs.
    """
    url = os.environ.get("PREFECT_API_URL")
    record = read_record(data)
    if url is None and record is None:
        raise Unavailable(
            f"No service runs for '{data}'.",
            f"start one: headcast serve --data {data}, or name it: PREFECT_API_URL=URL",
        )
    url = (url or str((record or {})["url"])).rstrip("/")
    _check_url(url)
    if not is_healthy(url, 10.0):
        raise Unavailable(
            f"The server at {url} does not answer.", f"is it up? headcast serve --data {data} starts one here"
        )
    quiet_prefect()
    os.environ["PREFECT_API_URL"] = url
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise _refused(error) from None
    except httpx.HTTPError as error:
        raise Unavailable(f"The server at {url} stopped answering: {error}.", "try again") from None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(
            f"PREFECT_API_URL is '{url}', which is no address of a server.", "for example http://127.0.0.1:4200/api"
        )


def _refused(error: Any) -> HeadcastError:
    """What a server says of a request that it does not take."""
    try:
        detail = error.response.json()
        reason = detail.get("detail") or detail.get("exception_detail") or detail
    except ValueError:
        reason = error.response.text
    if error.response.status_code in (409, 422):
        return UserError(f"The server refuses it: {reason}.", "see headcast submit --help")
    return StageError(f"The server answered {error.response.status_code}: {reason}.", "its log tells more")


def polled(client: Any, pool: str) -> list[str]:
    """Names of the workers that poll a work pool now."""
    return [worker.name for worker in client.read_workers_for_work_pool(pool) if worker.status.value == "ONLINE"]
