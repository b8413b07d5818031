"""A small team of threads that work through one compiled kernel together.

Every member calls the same kernel with the same arguments; the kernel's phases hand out numbered chunks from atomic
counters, so a member that arrives late (or never) costs time but nothing else, and results do not depend on who
computed what. Own threads rather than numba's: those abort the process when two Python threads or a forked child use
them at once.

A kernel lasts a millisecond, and to wake a sleeping thread can take longer. So a member that has finished stays awake
for `_IDLE_ROUNDS`, outside Python, and takes the next job from memory; it yields its core to whoever wants it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from pipeline.rasterize.simd import atomic_add, atomic_load, pause

MAX_PHASES = 8
_SPINS = 2000  # pauses before a member that waits offers its core: some ten microseconds
_IDLE_ROUNDS = 200  # of `_SPINS` each, some milliseconds: from one pass of a training step to the next
_PATIENCE_SECONDS = 1.5
_STRIDE = 16  # int64s between counters, so that no two share a cache line
_COUNTERS = 2 * _STRIDE * MAX_PHASES

# Places in the box through which the leader of a job speaks to the members.
_TICKET, _KERNEL, _JOB, _WANTED, _JOINED, _ACTIVE, _SLEEPING = (k * _STRIDE for k in range(7))

# The member waited for may be off its core because other processes want it; spinning on would only keep it off.
_yield_core = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

_jit = njit(nogil=True, cache=True)


class Kernel:
    """A function of one job (see `counters`, `floats`, `integer`) that the team can call. It must not raise."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self.__name__, self._function = function.__name__, function
        self._compiled: Any = None

    def address(self) -> int:
        """Where the compiled function begins. It is compiled, or taken from numba's cache, when first asked for."""
        if self._compiled is None:
            self._compiled = cfunc(types.void(types.CPointer(types.int64)), cache=True)(self._function)
        return int(self._compiled.address)


_kernels: list[Kernel] = []


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Make a function of one job a kernel."""
    made = Kernel(function)
    _kernels.append(made)
    return made


def compile_kernels(report: Callable[[str], None]) -> None:
    """Have every kernel ready that has been imported.

    That takes a moment where numba's cache has them. Where it lasts, `report` is told once why.
    """
    message = "compiling the rasteriser for this processor; it is done once and takes some twenty seconds"
    alarm = threading.Timer(_PATIENCE_SECONDS, report, [message])
    alarm.daemon = True
    alarm.start()
    try:
        for each in _kernels:
            each.address()
    finally:
        alarm.cancel()


def _argument(builder: Any, job: Any, k: Any, part: int) -> Any:
    """The address (part 0) or size (part 1) of the k-th argument; a number stands in the address's place."""
    offset = builder.add(builder.mul(k, ir.Constant(k.type, 2)), ir.Constant(k.type, _COUNTERS + part))
    return builder.load(builder.gep(job, [offset]))


def _view(context: Any, builder: Any, array_type: Any, address: Any, size: Any) -> Any:
    """An array over memory that somebody else keeps."""
    array = context.make_array(array_type)(context, builder)
    itemsize = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    stride = ir.Constant(ir.IntType(64), itemsize)
    context.populate_array(
        array,
        data=address,
        shape=cgutils.pack_array(builder, [size]),
        strides=cgutils.pack_array(builder, [stride]),
        itemsize=stride,
        meminfo=None,
    )
    return array._getvalue()


def _argument_view(dtype: Any) -> Any:
    @intrinsic
    def view(typingctx: Any, job: Any, k: Any) -> Any:
        array_type = types.Array(dtype, 1, "C")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = ir.PointerType(context.get_data_type(dtype))
            address = builder.inttoptr(_argument(builder, args[0], args[1], 0), pointer)
            return _view(context, builder, array_type, address, _argument(builder, args[0], args[1], 1))

        return array_type(job, types.int64), codegen

    return view


floats = _argument_view(types.float32)
doubles = _argument_view(types.float64)
int32s = _argument_view(types.int32)
int64s = _argument_view(types.int64)
uint16s = _argument_view(types.uint16)


@intrinsic
def integer(typingctx: Any, job: Any, k: Any) -> Any:
    """The k-th argument of a job, a whole number."""
    return types.int64(job, types.int64), lambda context, builder, sig, args: _argument(builder, args[0], args[1], 0)


@intrinsic
def counters(typingctx: Any, job: Any) -> Any:
    """The counters that hand out a job's chunks, first argument of `take`, `done` and `wait`."""
    array_type = types.Array(types.int64, 1, "C")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _view(context, builder, array_type, args[0], ir.Constant(ir.IntType(64), _COUNTERS))

    return array_type(job), codegen


@intrinsic
def _call(typingctx: Any, address: Any, job: Any) -> Any:
    """Call the kernel at an address with the job at another."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = ir.IntType(64).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@_jit
def _serve(box: np.ndarray, ticket: int) -> int:
    """Work on every job that opens after `ticket`, until none has come for a while; the last ticket seen."""
    idle = 0
    while idle < _IDLE_ROUNDS:
        for _ in range(_SPINS):
            if atomic_load(box, _TICKET) != ticket:
                break
            pause()
        else:
            idle += 1
            _yield_core()
            continue
        ticket = atomic_load(box, _TICKET)
        if ticket & 1 == 0:
            continue
        # The leader closes the job and then waits for nobody to be active: whoever still finds it open may enter.
        atomic_add(box, _ACTIVE, 1)
        if atomic_load(box, _TICKET) == ticket and atomic_add(box, _JOINED, 1) < box[_WANTED]:
            _call(box[_KERNEL], box[_JOB])
        atomic_add(box, _ACTIVE, -1)
        idle = 0
    return ticket


@_jit
def _open(box: np.ndarray, kernel: int, job: int, wanted: int) -> int:
    """Offer a job to the members; how many of them sleep."""
    box[_KERNEL], box[_JOB], box[_WANTED], box[_JOINED] = kernel, job, wanted, 0
    atomic_add(box, _TICKET, 1)
    return atomic_load(box, _SLEEPING)


@_jit
def _work(kernel: int, job: int) -> None:
    _call(kernel, job)


@_jit
def _close(box: np.ndarray) -> None:
    """Let nobody else into an open job, and return when everybody has left."""
    if box[_TICKET] & 1:
        atomic_add(box, _TICKET, 1)
    spins = 0
    while atomic_load(box, _ACTIVE) > 0:
        spins += 1
        pause()
        if spins > _SPINS:
            _yield_core()


@_jit
def _add(box: np.ndarray, place: int, value: int) -> int:
    return atomic_add(box, place, value)


class _Team:
    """The threads of this process and the box they look into."""

    def __init__(self) -> None:
        self.box = np.zeros(8 * _STRIDE, np.int64)
        self.lock = threading.Lock()
        self.members: list[threading.Thread] = []
        self.stopped = False
        self._alarm = threading.Semaphore(0)

    def hire(self, count: int) -> None:
        while len(self.members) < count:
            thread = threading.Thread(target=self._live, name="rasterize", daemon=True)
            self.members.append(thread)
            thread.start()

    def wake(self, sleeping: int) -> None:
        _add(self.box, _SLEEPING, -sleeping)
        self._alarm.release(sleeping)

    def stop(self) -> None:
        """End the threads: a compiled function must not meet the end of the interpreter."""
        self.stopped = True
        for _ in self.members:
            self._alarm.release()
        for thread in self.members:
            thread.join()

    def _live(self) -> None:
        ticket = 0
        while not self.stopped:
            ticket = _serve(self.box, ticket)
            _add(self.box, _SLEEPING, 1)
            # A job that opened before the leader could see this sleeper must not be slept through. The alarm that it
            # may then get for nothing costs one more round of waiting.
            if self.box[_TICKET] == ticket:
                self._alarm.acquire()


_team = _Team()


@atexit.register
def _stop() -> None:
    _team.stop()


def _forget_threads() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(kernel: Kernel, threads: int | None, *args: Tensor | int) -> None:
    """Call a kernel with these arguments on this thread and up to `threads - 1` others; return when it is finished.

    Tensors must be contiguous, on the CPU, and of the dtype that the kernel takes them for. Where another Python thread
    has the team, this one works alone. `threads` None takes torch.get_num_threads().
    """
    threads = torch.get_num_threads() if threads is None else threads
    values: list[int] = []
    for arg in args:
        values += (arg, 0) if isinstance(arg, int) else (arg.data_ptr(), arg.numel())
    job = np.zeros(_COUNTERS + len(values), np.int64)
    job[_COUNTERS:] = values
    address, place = kernel.address(), job.ctypes.data
    team = _team
    if threads > 1 and team.lock.acquire(blocking=False):
        try:
            team.hire(threads - 1)
            sleeping = _open(team.box, address, place, threads - 1)
            if sleeping:
                team.wake(sleeping)
            _work(address, place)
        finally:
            _close(team.box)  # after an interrupt too: the job's memory must outlive the members' work
            team.lock.release()
    else:
        _work(address, place)


@_jit
def take(sync: np.ndarray, phase: int, chunks: int) -> int:
    """The next chunk of a phase that nobody has taken yet, or -1."""
    chunk = atomic_add(sync, 2 * _STRIDE * phase, 1)
    return chunk if chunk < chunks else -1


@_jit
def done(sync: np.ndarray, phase: int) -> None:
    """Report a taken chunk as finished."""
    atomic_add(sync, 2 * _STRIDE * phase + _STRIDE, 1)


@_jit
def wait(sync: np.ndarray, phase: int, chunks: int) -> None:
    """Wait until every chunk of a phase is finished, giving the core away if that takes long."""
    spins = 0
    while atomic_load(sync, 2 * _STRIDE * phase + _STRIDE) < chunks:
        spins += 1
        pause()
        if spins > _SPINS:
            _yield_core()
