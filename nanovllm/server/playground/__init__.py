"""The playground at `/`: one static page that talks to the server's own API.

The page needs no build step and no other host. Whoever can reach the server may read it, key or no
key: it holds nothing secret, and its calls of the API bring the key that the reader typed in.
"""

from collections.abc import Awaitable, Callable
from hashlib import blake2b
from pathlib import Path

from fastapi import APIRouter, Request, Response

ASSETS = {
    "/": ("index.html", "text/html"),
    "/playground/api.js": ("api.js", "text/javascript"),
    "/playground/archive.js": ("archive.js", "text/javascript"),
    "/playground/conversation.js": ("conversation.js", "text/javascript"),
    "/playground/engine.js": ("engine.js", "text/javascript"),
    "/playground/favicon.svg": ("favicon.svg", "image/svg+xml"),
    "/playground/playground.css": ("playground.css", "text/css"),
    "/playground/playground.js": ("playground.js", "text/javascript"),
    "/playground/requests.js": ("requests.js", "text/javascript"),
    "/playground/speech.js": ("speech.js", "text/javascript"),
    "/playground/settings.js": ("settings.js", "text/javascript"),
}
"""File and media type of each path; all of them are open to requests without a key."""

# What a model or a server writes is shown as text. Should a line of ours ever forget that, the
# browser refuses: no inline script, no other host, and no string turned into markup.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

router = APIRouter(include_in_schema=False)


def _endpoint_of(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that serves one file, or says that the browser's copy is still good."""
    content = (Path(__file__).parent / name).read_bytes()
    headers = {
        "Cache-Control": "no-cache",  # keep it, but ask first: an update shows at once
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "ETag": f'"{blake2b(content, digest_size=12).hexdigest()}"',
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    async def serve(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve


for path, (name, media_type) in ASSETS.items():
    router.add_api_route(path, _endpoint_of(name, media_type), methods=["GET"], name=name)
