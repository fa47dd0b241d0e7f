"""A network between two processes that can be cut, healed, and made to damage what it carries. TCP, no root needed."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class Proxy:
    """Listens on `host` and forwards to `target`. While it is cut, connections hang and new ones are not answered:
    as if packets were dropped."""

    def __init__(self, target: tuple[str, int], host: str = "127.0.0.1") -> None:
        self._target = target
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        self._open = threading.Event()
        self._open.set()
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self.carried = 0
        """Bytes from the target."""
        self.break_after: list[int] = []
        """Break the connection in which so many bytes in all came from the target, once for each."""
        self.damage_at: list[int] = []
        """Flip a bit of the byte that comes from the target as the so-manieth, once for each."""
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def break_all(self) -> None:
        """Every connection ends now."""
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.break_all()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                self._open.wait()
                far = socket.create_connection(self._target)
            except OSError:
                continue
            self._sockets.append(far)
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                for one in select.select([near, far], [], [])[0]:
                    data = bytearray(one.recv(1 << 16))
                    self._open.wait()
                    if not data:
                        raise OSError
                    if one is near:
                        far.sendall(data)
                        continue
                    near.sendall(self._treated(data))
        for one in (near, far):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _treated(self, data: bytearray) -> bytearray:
        before, self.carried = self.carried, self.carried + len(data)
        for at in [at for at in self.damage_at if before <= at < self.carried]:
            self.damage_at.remove(at)
            data[at - before] ^= 1
        for at in [at for at in self.break_after if before <= at < self.carried]:
            self.break_after.remove(at)
            raise OSError
        return data
