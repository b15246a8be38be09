"""A line to a server on which answers are slow, as callers far away have it."""

import contextlib
import socket
import threading
import time

CHUNK_BYTES = 1 << 14
BUFFER_BYTES = 1 << 14  # of the kernel, so that what is not taken yet waits at the server


class SlowLine:
    """Listens at `url` and passes everything on, what the server sends at `bytes_per_s`; as a context manager."""

    def __init__(self, server_url: str, bytes_per_s: float = 250_000.0) -> None:
        host, port = server_url.rsplit(":", 1)
        self._server, self._bytes_per_s = (host, int(port)), bytes_per_s
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listening]
        self._threads: list[threading.Thread] = []
        self.passed_bytes = 0

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> "SlowLine":
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join()

    def _begin(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listening.accept()
            except OSError:  # closed
                return
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            server.connect(self._server)
            self._open += [caller, server]
            self._begin(self._pass_on, caller, server, False)
            self._begin(self._pass_on, server, caller, True)

    def _pass_on(self, source: socket.socket, target: socket.socket, slowly: bool) -> None:
        with contextlib.suppress(OSError):  # an end was closed
            while data := source.recv(CHUNK_BYTES):
                if slowly:
                    self.passed_bytes += len(data)
                    time.sleep(len(data) / self._bytes_per_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
