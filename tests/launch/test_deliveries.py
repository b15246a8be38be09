"""Answers on their way: what the other end has not taken stands in the send queue of its connection."""

import contextlib
import socket
import threading
import time

import pytest

from stepvideo_serve.launch.deliveries import QUIET_S, undelivered, wait_until_delivered

PLENTY = b"x" * (1 << 16)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_what_the_other_end_has_not_taken_is_undelivered(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection((host, port)) as caller, listening.accept()[0] as connection:
            assert undelivered([port]) == 0
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    connection.send(PLENTY)
            assert undelivered([port]) == 1
            assert undelivered([caller.getsockname()[1]]) == 0, "the other end has sent nothing"
            reader = threading.Thread(target=read_to_the_end, args=(caller,))
            reader.start()
            wait_until_delivered([port], time.monotonic() + 60.0, lambda: True)
            assert undelivered([port]) == 0
            connection.shutdown(socket.SHUT_WR)
            reader.join()


def read_to_the_end(caller: socket.socket) -> None:
    while caller.recv(len(PLENTY)):
        continue


def test_nobody_is_waited_for_beyond_the_deadline_or_the_server() -> None:
    began_s = time.monotonic()
    wait_until_delivered([1], began_s, lambda: True)
    wait_until_delivered([1], began_s + 60.0, lambda: False)
    wait_until_delivered([1], began_s + 60.0, lambda: True, quiet_s=0.0)
    assert time.monotonic() - began_s < QUIET_S
