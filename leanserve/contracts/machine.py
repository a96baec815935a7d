"""Which machine this is: process ids mean something on one only."""

import contextlib
import hashlib
import os
import socket
from pathlib import Path

__all__ = ["this_machine"]


def this_machine() -> str:
    """The same for processes that can see each other's ids, and for no others: host names alone are often shared, by
    copies of one image and by containers. Written `name/digest`."""
    name = socket.gethostname()
    facts = [name]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return f"{name}/{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:8]}"
