"""The threads that share the rasteriser's kernels."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from pipeline.rasterize import team
from pipeline.rasterize.simd import atomic_add, atomic_load, pause

RENDER = """
import torch
from pipeline.rasterize import rasterize
generator = torch.Generator().manual_seed(0)
means = torch.randn(300, 3, generator=generator) * 0.1 + torch.tensor([0.0, 0.0, 1.0])
quats, scales = torch.randn(300, 4, generator=generator), 0.01 + 0.02 * torch.rand(300, 3, generator=generator)
K = torch.tensor([[60.0, 0, 24], [0, 60, 20], [0, 0, 1]])
values = (means, quats, scales, torch.rand(300, generator=generator), torch.rand(300, 3, generator=generator))


def run(backend, dtype, threads):
    inputs = [value.clone().to(dtype).requires_grad_() for value in values]
    render = rasterize(*inputs, torch.eye(4, dtype=dtype), K.to(dtype), 48, 41, backend=backend, threads=threads)
    (render.image.square().sum() + render.alpha.sum()).backward()
    return [render.image, render.alpha, *(value.grad for value in inputs)]
"""


@team.kernel
def _meet(job: Any) -> None:
    """Two chunks, each of which waits (not for ever) to see that somebody works on the other."""
    sync, here, met = team.counters(job), team.int64s(job, 0), team.int64s(job, 1)
    while True:
        chunk = team.take(sync, 0, 2)
        if chunk < 0:
            break
        atomic_add(here, chunk, 1)
        spins = 0
        while atomic_load(here, 1 - chunk) == 0 and spins < team.integer(job, 2):
            spins += 1
            pause()
        met[chunk] = atomic_load(here, 1 - chunk)
        team.done(sync, 0)
    team.wait(sync, 0, 2)


def _two_work_at_once(threads: int = 2, spins: int = 200_000_000) -> bool:
    here, met = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    team.run(_meet, threads, here, met, spins)
    return bool(met.all())


def test_members_work_at_once() -> None:
    assert _two_work_at_once()
    assert not _two_work_at_once(threads=1, spins=1000)  # the first chunk is alone until it gives up


def test_sleeping_members_wake() -> None:
    assert _two_work_at_once()
    deadline = time.monotonic() + 30
    while team._team.box[team._SLEEPING] == 0:
        assert time.monotonic() < deadline, "no member went to sleep"
        time.sleep(0.01)
    assert _two_work_at_once()


def test_an_interrupted_job_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(kernel: int, job: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(team, "_work", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _two_work_at_once(spins=1000)
    assert team._team.box[team._TICKET] % 2 == 0 and team._team.box[team._ACTIVE] == 0
    assert _two_work_at_once()


def test_a_second_python_thread_works_alone() -> None:
    results: list[bool] = []
    with team._team.lock:  # as while another thread's job runs
        thread = threading.Thread(target=lambda: results.append(_two_work_at_once(spins=1000)))
        thread.start()
        thread.join()
    assert results == [False]


def _child(results: Any) -> None:
    results.put((len(team._team.members), _two_work_at_once()))


def _work_and_fork(results: Any) -> None:
    before = _two_work_at_once()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(results,))
    child.start()
    child.join()
    results.put((child.exitcode, before))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_hires_its_own_members() -> None:
    # In a process of its own: what other tests have started would end with the child, too.
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_work_and_fork, args=(results,))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    assert results.get() == (0, True), "no members before its first job, two at work then"
    assert results.get() == (0, True), "the child ended well, its parent worked before"


def test_the_interpreter_ends_while_members_are_awake() -> None:
    code = RENDER + "run('cpu', torch.float32, 3)"
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_processor_without_wide_vectors_computes_the_same() -> None:
    """Compiled for the oldest x86-64: narrow vectors, no fused multiply-add, no compress instruction."""
    if platform.machine() != "x86_64":
        pytest.skip("the fallback is that of x86-64")
    code = RENDER + (
        "for ours, truth in zip(run('cpu', torch.float32, 2), run('reference', torch.float64, 1)):\n"
        "    error = (ours - truth).norm() / truth.norm()\n"
        "    assert error < 1e-3, error\n"
    )
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=plain)
    assert done.returncode == 0, done.stderr


def test_compiling_is_announced_when_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: team.Kernel) -> int:
        time.sleep(0.2)
        return 0

    monkeypatch.setattr(team.Kernel, "address", slow)
    monkeypatch.setattr(team, "_PATIENCE_SECONDS", 0.05)
    said: list[str] = []
    team.compile_kernels(said.append)
    assert len(said) == 1 and "compiling the rasteriser" in said[0]
    monkeypatch.setattr(team, "_PATIENCE_SECONDS", 60)
    team.compile_kernels(said.append)
    assert len(said) == 1
