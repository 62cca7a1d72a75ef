"""No test can reach the network; what stays on this machine works."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path

import pytest

from offline import NetworkRefusedError

# Reserved for documentation (RFC 5737, RFC 3849) and for never being a name (RFC 2606).
ADDRESS_4, ADDRESS_6, NAME = "192.0.2.1", "2001:db8::1", "example.invalid"


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, (ADDRESS_4, 443)), (socket.AF_INET6, (ADDRESS_6, 443, 0, 0)), (socket.AF_INET, (NAME, 443))],
)
def test_connecting_is_refused_and_names_the_address(family, address):
    with socket.socket(family) as one, pytest.raises(NetworkRefusedError, match=address[0]):
        one.connect(address)
    with socket.socket(family) as one, pytest.raises(NetworkRefusedError, match=address[0]):
        one.connect_ex(address)


def test_datagrams_are_refused():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        pytest.raises(NetworkRefusedError, match=ADDRESS_4),
    ):
        one.sendto(b"hello", (ADDRESS_4, 53))


@pytest.mark.parametrize("host", [ADDRESS_4, NAME])
def test_create_connection_is_refused(host):
    with pytest.raises(NetworkRefusedError, match=host):
        socket.create_connection((host, 443), timeout=1)


def test_no_library_can_swallow_the_refusal():
    with pytest.raises(NetworkRefusedError, match=NAME):
        urllib.request.urlopen(f"http://{NAME}/", timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_allowed(host):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection((host, server.getsockname()[1]), timeout=10) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"


def test_unix_sockets_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket has a short limit
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")


def test_model_hubs_are_told_to_stay_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
