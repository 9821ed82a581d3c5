"""mlx-lm's server with packed caches: it checks its port first, stops when its model cannot be loaded, and goes on from
the turns that its caches hold."""

import functools
import socket
import threading


def check_port(host, port):
    """Fails now, before a model is loaded, when the server could not listen.  The range first: getaddrinfo wraps."""
    if not 0 <= port <= 65535:
        raise OSError("a port is from 0 to 65535")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def watched(module, seen, replaced):
    """Replaces what mlx-lm's server module runs, and notes in `replaced` what stood there.

    Raises OSError when the port is taken, before a model is loaded.  The server stops when its own model cannot be
    loaded, rather than answer nothing for ever; the list that is returned then holds the error."""
    import mlx.core as mx

    from ..overlay import lm_server, requests, turns

    if mx.distributed.init().rank() == 0:
        try:
            check_port(seen.host, seen.port)
        except OSError as error:
            raise OSError(f"cannot listen on {seen.host}:{seen.port}: {error.strerror or error}") from error
    failed = []
    listening, servers = threading.Event(), []

    class Stoppable(module.ThreadingHTTPServer):
        def serve_forever(self, poll_interval=0.5):
            servers.append(self)
            listening.set()
            super().serve_forever(poll_interval)

    serve = module._run_http_server

    @functools.wraps(serve)
    def stoppable(host, port, generator):
        serve(host, port, generator, server_class=Stoppable, handler_class=lm_server.handler(module))

    def stop():
        # No signal: a program that a script put into the background may ignore them.  mlx-lm starts its thread before
        # its HTTP loop, so that this one waits for the loop.
        listening.wait()
        servers[0].shutdown()

    provider = module.ModelProvider
    load_default = provider.load_default

    def load_own(self):
        try:
            load_default(self)
        except Exception as error:
            failed.append(error)
            threading.Thread(target=stop, daemon=True).start()
            raise

    class Watched(provider):
        load_default = load_own

        def load(self, model_path, adapter_path=None, draft_model_path=None):
            # A request names these.
            if draft_model_path not in (None, "default_model", seen.draft_model):
                raise ValueError(
                    f"draft_model must be the server's own --draft-model ({seen.draft_model or 'it has none'}); got "
                    f"{draft_model_path!r}"
                )
            return super().load(model_path, adapter_path, draft_model_path)

    replaced["_run_http_server"] = serve
    module._run_http_server = stoppable
    replaced["ModelProvider"] = provider
    module.ModelProvider = Watched
    replaced["ResponseGenerator"] = module.ResponseGenerator
    module.ResponseGenerator = requests.checked(module)
    replaced["stream_generate"] = module.stream_generate
    module.stream_generate = turns.continued(module.stream_generate)
    return failed
