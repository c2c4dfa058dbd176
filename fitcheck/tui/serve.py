"""`fitcheck --serve`: the same screen in a browser, on this machine alone.

Each visitor is a process of its own, so only this machine's own pages may connect: requests under
another name (DNS rebinding) and from other sites' pages are refused, and pages load nothing from
elsewhere. Measuring on the GPU is off unless it is allowed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

from fitcheck.errors import FitCheckError

try:
    from aiohttp import web
    from aiohttp.typedefs import Handler, Middleware
    from textual_serve.server import Server
except ImportError as fault:
    raise FitCheckError(
        f"serving needs {fault.name}", "pip install 'fitcheck-rlhf[serve]'"
    ) from fault

PORT = 8000
NAMES = ("localhost", "127.0.0.1", "[::1]")
# 'unsafe-inline': the page's own script and style; no 'unsafe-eval', no other host, no frames.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self' ws://localhost:{port}; "
    "frame-ancestors 'none'"
)


class LocalServer(Server):
    """Textual's server, for this machine's own browser."""

    def __init__(self, port: int = PORT, allow_measure: bool = False) -> None:
        words = [sys.executable, "-m", "fitcheck.tui"]
        words += [] if allow_measure else ["--no-measure"]
        join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
        super().__init__(join(words), host="localhost", port=port, title="FitCheck")

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self.guard())
        return app

    def guard(self) -> Middleware:
        """Refuses what does not come from this machine's own page."""
        hosts = {f"{name}:{self.port}" for name in NAMES}
        origins = {f"http://{host}" for host in hosts}

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            origin = request.headers.get("Origin")
            if request.host not in hosts or (origin is not None and origin not in origins):
                raise web.HTTPForbidden(text="FitCheck serves this machine's own browser alone")
            response = await handler(request)
            if not response.prepared:
                response.headers["Content-Security-Policy"] = POLICY.format(port=self.port)
            return response

        return guarded

    async def on_startup(self, app: web.Application) -> None:
        """Say where."""
        print(f"FitCheck is at {self.public_url}; ctrl+c ends it", flush=True)


def serve(port: int = PORT, allow_measure: bool = False) -> int:
    """Serve until interrupted; FitCheckError where the port is taken."""
    try:
        LocalServer(port, allow_measure).serve()
    except OSError as fault:
        raise FitCheckError(
            f"port {port} cannot be used: {fault.strerror}", "choose another with --port"
        ) from fault
    return 0
