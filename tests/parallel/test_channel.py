"""Messages over a socket pair, and exceptions as messages."""

import socket
import threading
from collections.abc import Iterator

import pytest

from stepvideo_serve.errors import CheckpointError, DeadlineExceeded, InvalidRequest, WorkerFailed
from stepvideo_serve.parallel.channel import (
    MESSAGE_LIMIT_BYTES,
    Channel,
    ChannelClosedError,
    JsonObject,
    encode,
    error_from_json,
    error_to_json,
)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, 0.2)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_messages_keep_their_borders_and_order(pair: tuple[Channel, socket.socket]) -> None:
    channel, other_end = pair
    messages: list[JsonObject] = [
        {"kind": "a", "text": "小猫 \ud83d"},
        {"kind": "b", "n": [1, 2.5, None]},
        {"kind": "c"},
    ]
    other_end.sendall(b"".join(encode(message) for message in messages))
    assert [channel.receive() for _ in messages] == messages


def test_a_message_larger_than_the_socket_buffer_arrives(pair: tuple[Channel, socket.socket]) -> None:
    channel, other_end = pair
    message = {"kind": "a", "text": "x" * (MESSAGE_LIMIT_BYTES - 100)}
    sender = threading.Thread(target=other_end.sendall, args=(encode(message),))
    sender.start()
    assert channel.receive() == message
    sender.join()


def test_a_message_over_the_limit_is_refused_by_the_sender() -> None:
    with pytest.raises(InvalidRequest, match=f"may have {MESSAGE_LIMIT_BYTES} bytes"):
        encode({"kind": "a", "text": "x" * MESSAGE_LIMIT_BYTES})


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "closed the channel"),
        (b"\0\0\0\x09{}", "closed the channel"),
        ((MESSAGE_LIMIT_BYTES + 1).to_bytes(4, "big"), "are allowed"),
        (b"\0\0\0\x02{]", "could not be read"),
        (b"\0\0\0\x02{}", "without a kind"),
    ],
)
def test_whatever_else_comes_ends_the_channel(pair: tuple[Channel, socket.socket], wire: bytes, reason: str) -> None:
    channel, other_end = pair
    other_end.sendall(wire)
    other_end.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosedError, match=reason):
        channel.receive()


def test_drain_takes_what_is_there_and_keeps_half_a_message_for_later(pair: tuple[Channel, socket.socket]) -> None:
    channel, other_end = pair
    assert channel.drain() == []
    first, second = encode({"kind": "a"}), encode({"kind": "b", "text": "x" * 100})
    other_end.sendall(first + first + second[:50])
    assert channel.drain() == [{"kind": "a"}] * 2
    assert channel.drain() == []
    other_end.sendall(second[50:])
    other_end.close()
    assert channel.drain() == [{"kind": "b", "text": "x" * 100}], "the end comes after the last message"
    with pytest.raises(ChannelClosedError, match="closed the channel"):
        channel.drain()


def test_a_side_that_does_not_read_is_given_up_and_sees_the_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, other_end = pair
    with pytest.raises(ChannelClosedError, match="could not be sent"):
        channel.send(encode({"kind": "a", "text": "x" * (MESSAGE_LIMIT_BYTES - 100)}))
    while other_end.recv(1 << 16):
        continue


def test_a_request_error_keeps_its_class_and_sentence() -> None:
    error = error_from_json(error_to_json(DeadlineExceeded("Too late.")), "Rank 0 failed")
    assert type(error) is DeadlineExceeded
    assert str(error) == "Too late."


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (ValueError("bad\n  value."), "Rank 3 failed: ValueError: bad value."),
        (CheckpointError("No file."), "Rank 3 failed: CheckpointError: No file."),
    ],
)
def test_any_other_exception_becomes_worker_failed_in_one_line(raised: Exception, sentence: str) -> None:
    error = error_from_json(error_to_json(raised), "Rank 3 failed")
    assert type(error) is WorkerFailed
    assert str(error) == sentence
