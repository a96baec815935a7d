"""The address under which other machines of the group reach this one."""

import contextlib
import socket
import struct

__all__ = ["address_towards", "interface_of"]

_SIOCGIFADDR = 0x8915


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`. Nothing is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address (Linux); None where that cannot be told."""
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
