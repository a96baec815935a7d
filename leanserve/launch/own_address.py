"""The address under which other machines of the group reach this one."""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator

from leanserve.contracts.errors import ConfigError

__all__ = ["address_towards", "interface_of", "is_loopback"]

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"
"""Nobody's address (RFC 5737): the way there is the way out."""


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`. Nothing is sent.

    Where `host` is a name of this machine itself that leads to its loopback, as /etc/hosts often has it, the address on
    its way out; without one, its only other one.

    Raises:
        ConfigError: there is no such address, or a choice of them.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    own = _source_towards(family, address)
    if not is_loopback(own) or is_loopback(host):  # who writes 127.0.0.1 means this machine alone
        return own
    with contextlib.suppress(OSError):
        return _source_towards(socket.AF_INET, (_ELSEWHERE, 9))
    others = [found for _, found in _interfaces() if not is_loopback(found)]
    if len(others) != 1:
        raise ConfigError(
            f"{host} leads to {own} here, where no other machine finds it, and this machine has "
            f"{', '.join(others) or 'no other address'}; name one in place of {host}"
        )
    return others[0]


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address (Linux); None where that cannot be told."""
    return next((name for name, found in _interfaces() if found == address), None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Other names than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _source_towards(family: int, address: tuple[object, ...]) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _interfaces() -> Iterator[tuple[str, str]]:
    """Every interface that has an IPv4 address, with it (Linux); none where that cannot be told."""
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])
