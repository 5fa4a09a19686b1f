"""Limits on the connections of the server: their number, and the time for a request and for its answer."""

import asyncio
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

MOST_CONNECTIONS, LONGEST_QUEUE = 256, 128
"""Connections at the same time, and connections that wait to be accepted, if the system allows so many open files."""
REQUEST_SECONDS = 10
"""Time for a complete request, from the connection or from the previous answer."""
ANSWER_SECONDS = 60
"""Time for an answer; it starts again whenever the visitor has read a part."""
RESERVED_FILES = 16


def connection_limits() -> tuple[int, int]:
    """Returns the numbers of connections at the same time and in the queue, of which a process has files enough.

    A connection needs up to two: itself, and the picture that it sends.
    """
    if resource is None:
        return MOST_CONNECTIONS, LONGEST_QUEUE
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = MOST_CONNECTIONS * 4 if allowed == resource.RLIM_INFINITY else allowed - len([*Path("/dev/fd").iterdir()])
    free = max(8, free - RESERVED_FILES)
    queue = min(LONGEST_QUEUE, free // 5)
    return min(MOST_CONNECTIONS, (free - queue) // 2), queue


class LimitedProtocol(H11Protocol):
    """A connection that is closed if its request or its answer takes too long.

    If there are too many, a new one takes the place of the one that has waited longest for a request.

    Args:
        most: number of connections at the same time.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any):
        super().__init__(*arguments, **options)
        self._most = most
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None
        """When it began to wait for a request; None while a request is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)
        self._notice_request(before)

    def on_response_complete(self) -> None:
        before = self.cycle
        self._wait()
        super().on_response_complete()
        self._notice_request(before)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._waiting_since is None:
            self._limit(ANSWER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if self._waiting_since is None:  # a part of an answer is already sent
            self.transport.abort()
        else:
            self._refuse(400, "the request is too long or not valid HTTP")

    def _wait(self) -> None:
        self._waiting_since = self.loop.time()
        self._limit(REQUEST_SECONDS)

    def _notice_request(self, before: Any) -> None:
        if self.cycle is not before:
            self._waiting_since = None
            self._limit(ANSWER_SECONDS)

    def _limit(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._time_out)

    def _time_out(self) -> None:
        if self._waiting_since is not None and self.cycle is None:
            self._refuse(408, f"the request was not complete after {REQUEST_SECONDS} seconds")
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        idle = {
            each: each._waiting_since
            for each in self.connections
            if isinstance(each, LimitedProtocol) and each is not self and each._waiting_since is not None
        }
        if idle:
            oldest = min(idle, key=lambda each: idle[each])
            self.connections.discard(oldest)  # it is only lost later
            oldest.transport.abort()
        else:
            self._refuse(503, "too many visitors at once: try again")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps({"error": message}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
