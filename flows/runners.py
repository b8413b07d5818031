"""What carries out the tasks of a batch: threads here, or the workers of a Dask or Ray cluster.

Imported once `flows.environment.quiet_prefect` has been called.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipeline.batch import Pool
from pipeline.errors import UserError

CONNECT_SECONDS = 20
RAY_STORE_BYTES = 80_000_000
"""Only requests and outcomes pass through Ray's memory; it takes no less."""


@contextlib.contextmanager
def workers(pool: Pool) -> Iterator[tuple[TaskRunner[Any], int]]:
    """What carries tasks out, and how many at a time.

    Raises:
        UserError: no cluster answers at the address.
    """
    if pool.runner == "threads":
        threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=pool.subjects_at_a_time())
        with threads:
            yield threads, pool.subjects_at_a_time()
        return
    url = PREFECT_API_URL.value()
    if pool.cluster is not None and url is None:
        raise UserError(
            "The workers of a running cluster need a Prefect server that they can reach, and none is named.",
            "start one (docs/orchestration.md) and set PREFECT_API_URL to its address",
        )
    # The workers of a cluster of ours use the server that this process has started, not one each.
    settings = temporary_settings({PREFECT_API_URL: url or SubprocessASGIServer().api_url})
    with settings, _dask(pool) if pool.runner == "dask" else _ray(pool) as runner:
        yield runner


@contextlib.contextmanager
def _dask(pool: Pool) -> Iterator[tuple[TaskRunner[Any], int]]:
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    from prefect_dask.task_runners import DaskTaskRunner

    count = pool.subjects_at_a_time()
    ours = {"n_workers": count, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    runner = (
        DaskTaskRunner(address=pool.cluster, client_kwargs={"timeout": CONNECT_SECONDS})
        if pool.cluster
        else DaskTaskRunner(cluster_kwargs=ours)
    )
    with runner:
        with _answering(pool):
            client = runner.client
        yield runner, pool.workers or sum(client.nthreads().values()) or count


@contextlib.contextmanager
def _ray(pool: Pool) -> Iterator[tuple[TaskRunner[Any], int]]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from prefect_ray.task_runners import RayTaskRunner

    count = pool.subjects_at_a_time()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    ours = {
        "num_cpus": count,
        "include_dashboard": False,
        "object_store_memory": RAY_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    runner = RayTaskRunner(pool.cluster, quiet if pool.cluster else {**quiet, **ours})
    with contextlib.ExitStack() as stack:
        with _answering(pool):
            stack.enter_context(runner)
        yield runner, pool.workers or int(ray.cluster_resources().get("CPU", 0)) or count


@contextlib.contextmanager
def _answering(pool: Pool) -> Iterator[None]:
    """Turn what a cluster's client says of an address into words.

    Raises:
        UserError: nothing of its kind answers there.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if pool.cluster is None:
            raise
        raise UserError(
            f"No {pool.runner.capitalize()} cluster answers at '{pool.cluster}': {error}.",
            "check the address; without --cluster one is started here",
        ) from None
