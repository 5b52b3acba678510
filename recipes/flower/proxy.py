"""A counting TCP proxy: what really crosses between a node and the SuperLink, in bytes."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

__all__ = ["CountingProxy"]

_ADDRESS = "127.0.0.1"
_CHUNK = 2**16


class CountingProxy:
    """Pass bytes on between a free port of this machine and another one, and count them.

    TLS goes through it as it is: the counts are of what an eavesdropper would see above TCP.

    Args:
        port: Where connections go.

    Attributes:
        port: Where it listens.
        up: Bytes from those who connect.
        down: Bytes to them.
    """

    def __init__(self, port: int = 0) -> None:
        self.target = port
        self.up = self.down = 0
        self._lock = threading.Lock()
        self._server = socket.create_server((_ADDRESS, 0))
        self.port = int(self._server.getsockname()[1])
        self._open: set[socket.socket] = set()

    def __enter__(self) -> CountingProxy:
        """Start to listen."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for one in list(self._open):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection((_ADDRESS, self.target))
            except OSError:
                if self._server.fileno() < 0:
                    return
                continue
            self._open |= {near, far}
            for source, sink, name in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pass_on, args=(source, sink, name), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while data := source.recv(_CHUNK):
                with self._lock:
                    setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()
