"""The server of the search page and its requests, with FastAPI. It serves only pictures of the index."""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException

from misc.errors import UserError
from misc.files import resolved
from misc.search.connections import LimitedProtocol, connection_limits
from misc.search.pictures import Picture, picture_to_show
from misc.search.searcher import LONGEST_DESCRIPTION, Query, Result, Searcher, checked_description

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_RESULTS = 200
QUERIES_AT_ONCE = 64
LONGEST_REQUEST = 1 << 17
"""Bytes of a request's head: a description of 10,000 characters in any script fits, so it gets a clear error."""
LONGEST_ERROR = 300
"""In characters."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every response: the page loads nothing from other servers, and other pages cannot show the pictures."""

Count = Annotated[int, Parameter(ge=1, le=MOST_RESULTS)]
Threshold = Annotated[float, Parameter(ge=-1, le=1, allow_inf_nan=False)]
Answer = list[Result] | UserError


class QueryBatcher:
    """Answers queries in batches: queries that arrive during a search are answered together in the next one.

    Only one search runs at a time. So memory is bounded, and many users cost little more than one.

    Args:
        answer: answers Q queries; it is called in a thread.
    """

    def __init__(self, answer: Callable[[Sequence[Query]], list[Answer]]):
        self._answer = answer
        self._waiting: list[tuple[Query, asyncio.Future[Answer]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, query: Query) -> Answer:
        """Waits for the answer to a query."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:QUERIES_AT_ONCE], self._waiting[QUERIES_AT_ONCE:]
            answers: Sequence[Answer | Exception]
            try:
                answers = await asyncio.to_thread(self._answer, [query for query, _ in batch])
            except Exception as error:  # raised again for each query of the batch
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():  # the request was cancelled
                    continue
                if isinstance(answer, Exception) and not isinstance(answer, UserError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


def build_app(searcher: Searcher, *, allowed_hosts: Sequence[str]) -> FastAPI:
    """Builds the application. It answers an error with its status and `{"error": "<one line>"}`.

    Args:
        allowed_hosts: host names that this server accepts, in addition to the address that it is reached at; `*` for
            any. This stops DNS rebinding: another site whose name is made to resolve to this server cannot read the
            pictures.
    """
    app = FastAPI(title="Person search", docs_url=None, redoc_url=None, openapi_url=None)
    search = QueryBatcher(searcher.search)
    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/api/about")
    def about() -> dict[str, Any]:
        info = searcher.gallery.info
        return {
            "folder": _readable(resolved(searcher.folder).name),
            "images": info.pictures,
            "checkpoint": _readable(Path(info.checkpoint).name),
            "engine": searcher.engine_name,
            "longest_query": LONGEST_DESCRIPTION,
            "most_results": MOST_RESULTS,
        }

    @get("/api/search")
    async def by_description(text: str, results: Count = 20, threshold: Threshold = -1.0) -> Response:
        try:
            query = Query(description=checked_description(text), count=results)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        return await answer_query(query, threshold)

    @get("/api/similar")
    async def by_picture(path: str, results: Count = 20, threshold: Threshold = -1.0) -> Response:
        indexed(path)
        return await answer_query(Query(like=path, count=results), threshold)

    @get("/images/{path:path}")
    def image(path: str) -> Response:
        picture = indexed(path)
        try:
            content, media_type = picture_to_show(searcher.folder, picture)
        except UserError as error:
            raise HTTPException(404, str(error)) from error
        return Response(content, media_type=media_type)

    @get("/")
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", StaticFiles(directory=PAGE))

    def indexed(path: str) -> Picture:
        """Returns the picture of a path. Answers 404 unless the index lists it, so that no path leads elsewhere."""
        gallery = searcher.gallery  # a search in another thread may replace it
        try:
            row = gallery.row_of(path)
            picture = None if row is None else gallery.picture(row)
        except UserError as error:
            raise HTTPException(503, str(error)) from error
        if picture is None:
            raise HTTPException(404, f"{path} is not in the index")
        return picture

    async def answer_query(query: Query, threshold: float) -> Response:
        started = time.perf_counter()
        found = await search(query)
        if isinstance(found, UserError):
            raise HTTPException(503, str(found))
        seconds = time.perf_counter() - started
        return JSONResponse(
            {
                "milliseconds": round(1000 * seconds, 1),
                "images": searcher.gallery.info.pictures,
                "results": [result._asdict() for result in found if result.score >= threshold],
                "best": found[0].score if found else None,
                "notice": searcher.notice(query),
            }
        )

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        detail = f"{request.url.path}: {error.detail}" if error.detail in ("Not Found", "Method Not Allowed") else None
        return _error(error.status_code, detail or error.detail)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        given = f", not {str(first['input'])[:40]}" if first["loc"][-1] in request.query_params else ""
        return _error(400, f"{first['loc'][-1]}: {first['msg'][:1].lower()}{first['msg'][1:]}{given}")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        response = _error(500, "the search failed: see the output of `search.py serve`")
        response.headers.update(HEADERS)  # it does not pass through `guarded`
        return response

    @app.middleware("http")
    async def guarded(request: Request, proceed: Callable) -> Response:
        name = _host_name(request)
        address = (request.scope.get("server") or ("",))[0]  # no name, so no other site can have it
        if "*" in allowed_hosts or name in (*allowed_hosts, address):
            response = await proceed(request)
        else:
            response = _error(
                400, f"this server does not accept the host name {name}: start it with --allow-host {name}"
            )
        response.headers.update(HEADERS)
        return response

    return app


def _host_name(request: Request) -> str:
    """Returns the host name that the browser uses for this server, or an empty string if it is invalid."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:  # an unmatched bracket
        return ""


def _error(status: int, message: str) -> Response:
    message = " ".join(message.split())
    if len(message) > LONGEST_ERROR:
        message = f"{message[: LONGEST_ERROR - 100]} … {message[-90:]}"  # the remedy is at the end
    return JSONResponse({"error": _readable(message)}, status_code=status)


def _readable(text: str) -> str:
    """Returns the text with question marks for characters that UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def known_names(host: str, allowed_hosts: Sequence[str]) -> list[str]:
    """Returns the names that a server on `host` answers to: those of this machine, and those that the user allows."""
    return [*LOOPBACK, *(name.lower() for name in (host, socket.gethostname(), *allowed_hosts))]


def serve(
    searcher: Searcher, host: str, port: int, allowed_hosts: Sequence[str], announce: Callable[[str], None]
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        host: address to listen on.
        port: port to listen on; 0 for any free one.
        allowed_hosts: host names that the server accepts in addition to those of this machine.
        announce: called with the address of the page, once it can be reached.

    Raises UserError if the server cannot listen on the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}): give another --port or --host") from error
    with listener:
        port = listener.getsockname()[1]
        names = known_names(host, allowed_hosts)
        connections, queue = connection_limits()
        settings = uvicorn.Config(
            build_app(searcher, allowed_hosts=names),
            http=partial(LimitedProtocol, most=connections),  # type: ignore[arg-type]  # a class with one argument given
            ws="none",
            backlog=queue,
            h11_max_incomplete_event_size=LONGEST_REQUEST,
            timeout_graceful_shutdown=5,
            log_level="error",
            server_header=False,
        )
        announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean shutdown
            uvicorn.Server(settings).run(sockets=[listener])
