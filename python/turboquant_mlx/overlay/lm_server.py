"""mlx-lm's HTTP handler as OpenAI's clients expect it: parameters checked (bodies.py), statuses that tell a bad request
from a broken server, errors whose message the clients show, one model by its name."""

import io
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.errors import CacheNotFound

from ..commands import hub
from . import bodies, limits

_MODELS = "/v1/models"


def _status(error: BaseException | None) -> int:
    """Of an answer to a request whose prompt could not be generated from; mlx-lm says 404 to all."""
    from jinja2 import TemplateError  # a chat template that refuses the messages

    if isinstance(error, (ValueError, TemplateError)):
        return 400
    if isinstance(error, limits.Busy):
        return 503
    return 404 if isinstance(error, OSError) else 500  # a model that is not there, on the disk or on the hub


class _ErrorBody:
    """A file that writes mlx-lm's {"error": "..."} as OpenAI's clients read it."""

    def __init__(self, wfile: Any, status: int):
        self._wfile, self._status = wfile, status

    def write(self, data: bytes) -> int:
        try:
            message = json.loads(data)["error"]
        except (ValueError, TypeError, KeyError):  # headers, or a plain "Not Found"
            return self._wfile.write(data)
        return self._wfile.write(json.dumps(bodies.openai_error(self._status, message)).encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wfile, name)


def handler(module: Any) -> type:
    """`module.APIHandler` of mlx_lm.server, with these checks."""

    class Handler(module.APIHandler):
        _generating = False
        path: str
        rfile: Any
        wfile: Any

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self.path.endswith("/completions") or not length.isdigit():
                super().do_POST()
                return
            rules = {name: rule for name, rule in bodies.MLX_LM.items() if name != "prompt" or "chat" not in self.path}
            rfile = self.rfile
            try:
                body = bodies.checked(rfile.read(int(length)), rules)
            except ValueError as error:
                self._answer(400, {"error": str(error)})
                return
            self.headers.replace_header("Content-Length", str(len(body)))
            self.rfile = io.BytesIO(body)
            try:
                super().do_POST()
            finally:
                self.rfile = rfile

        def handle_completion(self, request: Any, stop_words: list[str]) -> None:
            self._generating = True
            try:
                super().handle_completion(request, stop_words)
            finally:
                self._generating = False

        def _set_completion_headers(self, status_code: int = 200) -> None:
            if status_code == 404 and self._generating:
                status_code = _status(sys.exc_info()[1])
            super()._set_completion_headers(status_code)
            if status_code >= 400:
                self.wfile = _ErrorBody(self.wfile, status_code)

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self._set_completion_headers(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def handle_models_request(self) -> None:
            wanted = unquote(urlsplit(self.path).path[len(_MODELS) :])[1:]
            models = self._models()
            if not wanted:
                self._answer(200, {"object": "list", "data": models})
                return
            # The server's own model goes by the name that it was started with, too.
            own = self.response_generator.cli_args.model
            names = {wanted, str(Path(own).resolve())} if own and wanted in (own, "default_model") else {wanted}
            found = [model for model in models if model["id"] in names]
            if not found and own and wanted in (own, "default_model"):  # it stands in no cache folder any more
                found = [{"object": "model", "created": self.created}]
            if found:
                self._answer(200, {**found[0], "id": wanted, "owned_by": "mlx-lm"})
            else:
                self._answer(404, {"error": f"no model {wanted!r} here; GET {_MODELS} lists those that are"})

        def _models(self) -> list[dict[str, Any]]:
            """What mlx-lm lists.  It writes the status before it looks, so that a scan of Hugging Face's cache folder
            that fails would leave an empty answer: the answer is caught, and without that folder it lists ours alone."""
            hub.make_cache_folder()
            wfile, path = self.wfile, self.path
            self.wfile, self.path = io.BytesIO(), _MODELS
            try:
                super().handle_models_request()
                return json.loads(self.wfile.getvalue().partition(b"\r\n\r\n")[2])["data"]
            except (OSError, CacheNotFound):
                own = Path(self.response_generator.cli_args.model or "")
                is_here = own.name and own.exists()
                return [{"id": str(own.resolve()), "object": "model", "created": self.created}] if is_here else []
            finally:
                self.wfile, self.path = wfile, path

    return Handler
