"""A small team of threads that work through one jitted kernel together.

Every member calls the same kernel with the same arguments; the kernel's phases hand out numbered chunks from atomic
counters, so a member that arrives late (or never) costs time but nothing else, and results do not depend on who
computed what. Own threads rather than numba's: those abort the process when two Python threads or a forked child use
them at once.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numba import njit, types

from pipeline.rasterize.simd import atomic_add, atomic_load

MAX_PHASES = 8
_SPINS = 1000  # about the microseconds that a switch of threads costs
_STRIDE = 16  # int64s between counters, so that no two share a cache line

# The member waited for may be off its core because other processes want it; spinning on would only keep it off.
_yield_core = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

_lock = threading.Lock()
_queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
_members = 0


def _serve(queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    while True:
        kernel, args = queue.get()
        kernel(*args)
        del kernel, args  # the arrays must not outlive the job while this thread waits for the next


def _forget_threads() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _queue, _members, _lock
    _queue, _members, _lock = SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(kernel: Callable[..., None], threads: int | None, *args: Any) -> None:
    """Call `kernel(sync, *args)` on this thread and offer it to `threads - 1` others.

    Returns when the kernel does on this thread; a kernel returns only when its last phase is finished. `kernel` must
    release the GIL. `threads` None takes torch.get_num_threads().
    """
    global _members
    threads = torch.get_num_threads() if threads is None else threads
    sync = np.zeros(2 * _STRIDE * MAX_PHASES, np.int64)
    if threads > 1:
        with _lock:
            while _members < threads - 1:
                threading.Thread(target=_serve, args=(_queue,), name="rasterize", daemon=True).start()
                _members += 1
        for _ in range(threads - 1):
            _queue.put((kernel, (sync, *args)))
    kernel(sync, *args)


@njit(nogil=True, cache=True)
def take(sync: np.ndarray, phase: int, chunks: int) -> int:
    """The next chunk of a phase that nobody has taken yet, or -1."""
    chunk = atomic_add(sync, 2 * _STRIDE * phase, 1)
    return chunk if chunk < chunks else -1


@njit(nogil=True, cache=True)
def done(sync: np.ndarray, phase: int) -> None:
    """Report a taken chunk as finished."""
    atomic_add(sync, 2 * _STRIDE * phase + _STRIDE, 1)


@njit(nogil=True, cache=True)
def wait(sync: np.ndarray, phase: int, chunks: int) -> None:
    """Wait until every chunk of a phase is finished, giving the core away if that takes long."""
    spins = 0
    while atomic_load(sync, 2 * _STRIDE * phase + _STRIDE) < chunks:
        spins += 1
        if spins > _SPINS:
            _yield_core()
