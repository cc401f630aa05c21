"""The part of RFC 6455 that reading a server's messages needs: handshake, text frames, pings. Nothing is
sent but pongs. Standard library only, so that run.py can follow a run before anything is installed."""

from __future__ import annotations

import base64
import os
import socket
import struct
from urllib.parse import urlsplit

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA


class WebSocket:
    """Messages of `ws://` at the given http URL and path. `timeout`: seconds of silence after which a read
    raises TimeoutError."""

    def __init__(self, url: str, path: str, timeout: float = 1.0) -> None:
        parts = urlsplit(url)
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._socket = socket.create_connection(address, timeout=10)
        self._buffer, self._message, self._kind = b"", b"", 0
        self._handshake(f"{address[0]}:{address[1]}", path)
        self._socket.settimeout(timeout)

    def close(self) -> None:
        self._socket.close()

    def _handshake(self, host: str, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        status = head.split(b"\r\n", 1)[0].decode(errors="replace")
        if " 101 " not in f"{status} ":
            raise OSError(f"the server refused the websocket: {status}")

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def read(self) -> str | None:
        """The next text message; None after `timeout` seconds without one. Binary ones (previews) are
        passed over. Raises ConnectionError when the server has gone."""
        try:
            while True:
                text = self._take(*self._frame())
                if text is not None:
                    return text
        except TimeoutError:
            return None

    def _take(self, final: bool, opcode: int, payload: bytes) -> str | None:
        """Handle one frame; returns a text message when the frame completes one."""
        if opcode == PING:
            self._send(PONG, payload)
        elif opcode == CLOSE:
            raise ConnectionError("the server closed the connection")
        elif opcode != PONG:
            self._kind = opcode or self._kind  # 0 continues the message before it
            self._message += payload
            if final:
                message, self._message = self._message, b""
                return message.decode("utf-8") if self._kind == TEXT else None
        return None

    def _frame(self) -> tuple[bool, int, bytes]:
        """The next whole frame: last of its message?, opcode, payload. Servers do not mask."""
        while (size := frame_size(self._buffer)) is None or len(self._buffer) < sum(size):
            self._receive()
        header, length = size
        first, payload = self._buffer[0], self._buffer[header : header + length]
        self._buffer = self._buffer[header + length :]
        return bool(first & 0x80), first & 0x0F, payload

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)


def frame_size(start: bytes) -> tuple[int, int] | None:
    """Bytes of the header and of the payload of the unmasked frame that begins so; None: too little to
    tell."""
    if len(start) < 2:
        return None
    code = start[1] & 0x7F
    header, form = {126: (4, ">H"), 127: (10, ">Q")}.get(code, (2, ""))
    if len(start) < header:
        return None
    return header, struct.unpack(form, start[2:header])[0] if form else code
