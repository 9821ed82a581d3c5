"""mlx-vlm's HTTP server as OpenAI's clients expect it: parameters checked (bodies.py) before the server reads them, bad
requests answered with 400 and errors whose message the clients show, one model by its name."""

import importlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import mlx.core as mx

from . import bodies, patch

_CHAT = ("/chat/completions", "/v1/chat/completions")
_UNEXPECTED = "An unexpected error occurred"  # how mlx-vlm begins the message of what its endpoint did not catch


def _structured() -> str | None:
    """Why mlx-vlm cannot keep an answer to a schema here, or None."""
    return None if mx.metal.is_available() else "mlx-vlm's structured answers are masked by a Metal kernel"


def _most_logprobs() -> int:
    from mlx_vlm.server.generation import get_top_logprobs_k

    return get_top_logprobs_k()


class CheckedBodies:
    """ASGI middleware: a chat request's body is checked and passed on, or answered with 400."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        self.rules = bodies.mlx_vlm(_structured, _most_logprobs)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _CHAT:
            await self.app(scope, receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        try:
            body = bodies.checked(raw, self.rules)
        except ValueError as error:
            from fastapi.responses import JSONResponse

            await JSONResponse(bodies.openai_error(400, str(error)), 400)(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        sent = False

        async def replay() -> dict[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app({**scope, "headers": headers}, replay, send)


def _checked_arguments(build: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-vlm's _build_gen_args, which also looks at tokens' ids: a logit_bias of a token that does not exist is an index
    that MLX does not check, and ends the process."""

    def checked(request: Any, *args: Any, **named: Any) -> Any:
        found = build(request, *args, **named)
        if found.logit_bias or found.top_k:
            size = _vocabulary()
            if not isinstance(found.top_k, int) or not 0 <= found.top_k < size:
                raise ValueError(f"top_k must be less than the vocabulary's {size} tokens; got {found.top_k}")
            strange = [token for token in found.logit_bias or {} if not 0 <= int(token) < size]
            if strange:
                raise ValueError(f"logit_bias must be of tokens from 0 to {size - 1}; got {strange[0]}")
        return found

    return checked


def _vocabulary() -> int:
    """The number of logits of the model that is loaded; 0 of a model that does not say it, which refuses."""
    from mlx_vlm.server.runtime import runtime

    config = runtime.model_cache.get("config")
    for part in (getattr(config, "text_config", None), config):
        size = part.get("vocab_size") if isinstance(part, dict) else getattr(part, "vocab_size", None)
        if size:
            return int(size)
    return 0


async def _answer(request: Any, error: Any) -> Any:
    """An HTTPException as OpenAI's clients read it.  What mlx-vlm did not catch and a value of the request caused, a
    picture that is none or a message that the chat template refuses, is the client's error."""
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from PIL import UnidentifiedImageError

    status, detail = error.status_code, error.detail
    cause = error.__context__
    if status == 500 and isinstance(cause, (ValueError, TemplateError, UnidentifiedImageError)):
        if str(detail).startswith(_UNEXPECTED):
            status, detail = 400, str(cause)
    message = detail if isinstance(detail, str) else str(detail)
    return JSONResponse(bodies.openai_error(status, message), status, headers=error.headers)


async def _answer_invalid(request: Any, error: Any) -> Any:
    """Values of a wrong type, which FastAPI finds and answers with 422."""
    from fastapi.responses import JSONResponse

    found = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:3])
    return JSONResponse(bodies.openai_error(400, found), 400)


def install() -> None:
    """Puts all of it into mlx-vlm's server of this process.  Idempotent; before the server runs."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException as PlainHTTPException

    module = importlib.import_module("mlx_vlm.server.app")  # the package has an attribute `app` of its own
    app = module.app
    if any(entry.cls is CheckedBodies for entry in app.user_middleware):
        return
    app.add_middleware(CheckedBodies)
    app.add_exception_handler(PlainHTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    patch._rebind("_build_gen_args", module._build_gen_args, _checked_arguments(module._build_gen_args))

    @app.get("/models/{name:path}", dependencies=module.inference_router.dependencies)
    @app.get("/v1/models/{name:path}", dependencies=module.inference_router.dependencies)
    def retrieve(name: str) -> dict[str, Any]:
        path = os.path.realpath(name)  # a local model may be named otherwise than it was when it was loaded
        for model in module.models_endpoint()["data"]:
            known = model if isinstance(model, dict) else model.model_dump()
            if known["id"] == name or (os.path.isdir(path) and os.path.realpath(known["id"]) == path):
                return {**known, "id": name, "owned_by": "mlx-vlm"}
        raise HTTPException(404, f"no model {name!r} here; GET /v1/models lists those that are")

    @app.post("/v1/completions", include_in_schema=False)
    def completions() -> None:
        raise HTTPException(404, "mlx-vlm's server has no /v1/completions: use /v1/chat/completions")
