"""A server of ours in this process, and clients of it."""

import contextlib
import http.client
import json
import threading
from http.server import ThreadingHTTPServer
from queue import Queue

import pytest
from mlx_lm import server as mlx_lm_server
from turboquant_mlx.commands import cli


class Served:
    """A running server, the address to reach it and its insides."""

    def __init__(self, httpd, generator):
        self.httpd, self.generator = httpd, generator
        self.port = httpd.server_address[1]

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def ask(self, path, **body):
        """(status, the answer's bytes)."""
        connection = self.connection()
        connection.request("POST", path, json.dumps({"temperature": 0.0, **body}))
        response = connection.getresponse()
        return response.status, response.read()

    def post(self, path, **body):
        status, answer = self.ask(path, **body)
        assert status == 200, answer
        return json.loads(answer)

    def complete(self, prompt, max_tokens):
        return self.post("/v1/completions", prompt=prompt, max_tokens=max_tokens)["choices"][0]["text"]


def at_once(call, items):
    """call(item) of every item, each in a thread of its own; the results in order."""
    results = [None] * len(items)

    def work(i):
        results[i] = call(items[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextlib.contextmanager
def serving(model, *options):
    """`turboquant_mlx server` in a thread; only its last step, the HTTP loop, is ours, so that the test can end it.
    One at a time."""
    started = Queue()

    def serve(host, port, generator, handler_class, **_):
        class Quiet(handler_class):
            def log_message(self, *_):
                pass

        httpd = ThreadingHTTPServer((host, port), lambda *args: Quiet(generator, *args))
        httpd.handle_error = lambda *_: None  # clients that hang up
        started.put(Served(httpd, generator))
        httpd.serve_forever(poll_interval=0.05)
        generator.stop_and_join()

    arguments = ["server", "--model", str(model), "--port", "0", "--tq-bits", "3", "--log-level", "CRITICAL", *options]
    patch = pytest.MonkeyPatch()
    patch.setattr(mlx_lm_server, "_run_http_server", serve)
    thread = threading.Thread(target=cli.main, args=(arguments,))
    thread.start()
    running = started.get(timeout=120)
    yield running
    running.httpd.shutdown()
    thread.join(timeout=60)
    running.httpd.server_close()
    patch.undo()
    assert not thread.is_alive()
