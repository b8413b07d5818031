"""Where Prefect keeps what flows return: beside the dataset in its object store, as JSON, so that any machine reads it.

Without a store nothing is kept but the dataset's own files. Nothing rests on these results: they may be removed.
"""

from __future__ import annotations

import hashlib
from typing import Any

RESULTS = ".results"


def results_in(store: str | None) -> dict[str, Any]:
    """Options for `Flow.with_options` that keep a flow's result in a store, through the server that is in use.

    Prefect takes a place for results only as a block that is saved on the server.

    Args:
        store: URL of the dataset store, already found good (`pipeline.store.open_store`); without one, no options.
    """
    if store is None:
        return {}
    return {"persist_result": True, "result_storage": _saved_block(store), "result_serializer": "json"}


def share_results(store: str | None) -> None:
    """Let every run of the server that is in use keep its result in a store, if there is one, whoever starts the run.

    What is written is JSON where PREFECT_RESULTS_DEFAULT_SERIALIZER says so, as it does in headcast's processes.
    """
    if store is None:
        return
    from prefect.client.orchestration import get_client

    block_id = _saved_block(store)._block_document_id
    with get_client(sync_client=True) as client:
        client.update_server_default_result_storage(block_id)


def _saved_block(store: str) -> Any:
    from prefect.filesystems import LocalFileSystem, RemoteFileSystem

    place = f"{store.rstrip('/')}/{RESULTS}"
    protocol, _, path = place.partition("://")
    block: Any = LocalFileSystem(basepath=path) if protocol == "file" else RemoteFileSystem(basepath=place)
    block.save(f"headcast-{hashlib.sha256(place.encode()).hexdigest()[:16]}", overwrite=True)
    return block
