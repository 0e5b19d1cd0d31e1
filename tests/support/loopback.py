"""An HTTP server on loopback that does what a test tells it to, right or wrong."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


class Request(BaseHTTPRequestHandler):
    """A GET request; behaviours answer it with :meth:`reply`.

    Attributes:
        offset: first byte that the client asks for.
    """

    seen: list[str | None]
    following: Iterator["Behaviour"]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.seen.append(asked)
        self.offset = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        next(self.following)(self)

    def reply(self, code: int, body: bytes = b"", announced: object = None, **headers: str) -> None:
        """Answer, and close the connection.

        Args:
            code: HTTP status.
            body: what is sent.
            announced: Content-Length; the body's own for None, none at all for "".
            headers: further ones.
        """
        self.send_response(code)
        if announced != "":
            length = len(body) if announced is None else announced
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has what it wants
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_arguments: object) -> None:
        pass


Behaviour = Callable[[Request], None]


@contextlib.contextmanager
def serving(*behaviours: Behaviour) -> Iterator[SimpleNamespace]:
    """Serve while the context lasts; one behaviour per request, the last for all that follow.

    Yields:
        ``url`` of a file ``weights.ckpt``, and ``seen``: the Range header of each request so far.
    """
    seen: list[str | None] = []
    following = itertools.chain(behaviours, itertools.repeat(behaviours[-1]))
    handler = type("Handler", (Request,), {"seen": seen, "following": following})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/models/weights.ckpt"
        yield SimpleNamespace(url=url, seen=seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
