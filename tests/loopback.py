"""Run a command in a network namespace that has nothing but loopback, and tell whether it reached for anything else.

`python tests/loopback.py FILE COMMAND...` writes to FILE how many packets had no route, which is what every connection
or look-up that leaves the machine becomes there. Its exit code is the command's.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
UNAVAILABLE = 77


def enter() -> None:
    """Move this process to a network namespace of its own and switch its loopback on.

    Raises:
        OSError: the kernel or the container does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace can be made here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def unrouted_packets() -> int:
    """Packets of this namespace, IPv4 and IPv6, that would have left the machine."""
    names, values = (line.split()[1:] for line in Path("/proc/self/net/snmp").read_text().splitlines()[:2])
    count = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    for line in Path("/proc/self/net/snmp6").read_text().splitlines():
        name, value = line.split()
        count += int(value) if name == "Ip6OutNoRoutes" else 0
    return count


if __name__ == "__main__":
    try:
        enter()
    except OSError:
        sys.exit(UNAVAILABLE)
    code = subprocess.run(sys.argv[2:], check=False).returncode
    Path(sys.argv[1]).write_text(str(unrouted_packets()))
    sys.exit(code)
