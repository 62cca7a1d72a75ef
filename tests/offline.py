"""Refuse every connection and every name look-up that would leave this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Generator
from unittest import mock


class NetworkRefusedError(BaseException):
    """A test tried to reach the network. Not an Exception, so that no library can catch it and carry on."""


def refuse_unless_local(address: object, family: int = socket.AF_INET) -> None:
    """Raise NetworkRefusedError unless the address is on this machine: loopback, or not of the internet at all."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return
    with contextlib.suppress(ValueError):  # a host name, and not that of this machine
        if ipaddress.ip_address(str(host).partition("%")[0]).is_loopback:
            return
    raise NetworkRefusedError(
        f"Got a connection to {address!r}. Expected no network in tests. Do this: use a file or a loopback address."
    )


@contextlib.contextmanager
def no_network() -> Generator[None, None, None]:
    """Guard the sockets of this process, and put the originals back at the end."""
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    getaddrinfo = socket.getaddrinfo

    def guarded_connect(self, address):
        refuse_unless_local(address, self.family)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        refuse_unless_local(address, self.family)
        return connect_ex(self, address)

    def guarded_sendto(self, data, *flags_and_address):
        refuse_unless_local(flags_and_address[-1], self.family)
        return sendto(self, data, *flags_and_address)

    def guarded_getaddrinfo(host, port, *args, **kwargs):
        refuse_unless_local((host, port))
        return getaddrinfo(host, port, *args, **kwargs)

    with (
        mock.patch.multiple(
            socket.socket, connect=guarded_connect, connect_ex=guarded_connect_ex, sendto=guarded_sendto
        ),
        mock.patch.object(socket, "getaddrinfo", guarded_getaddrinfo),
    ):
        yield
