"""A conversation of ten turns whose reasoning is dropped from the history, on our server and on mlx-lm's.

    python benchmarks/conversations/turns.py --model models/qwen35-tiny-4bit

Each turn sends the whole history: a system message, and of each answer only what follows its first half, as a client does
that drops the reasoning.  Printed for each way to ask: the tokens that the server read (prompt_tokens - cached_tokens) over
those that are new in the turn's prompt, and the time to the first token of the last turn.  The ways:

    plain    one request after the other
    seeded   the same with a seed, which mlx-lm serves without a batch
    tools    the messages of every second turn come from a tool
    edited   the last message is asked again in other words, each turn
    eight    eight such conversations at once
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "tests" / "data" / "valid.txt").read_text()


class Server:
    """A server in a process of its own."""

    def __init__(self, program, model, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", *program, "--model", str(model), "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                self.ask([{"role": "user", "content": "hello"}], 2)
                return
            except ConnectionRefusedError:
                time.sleep(0.2)
        raise RuntimeError("the server did not start")

    def ask(self, messages, count, **settings):
        """(text, usage, seconds to the first token) of an answer of `count` tokens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = {"messages": messages, "max_tokens": count, "temperature": 0.0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **settings}
        start, first, text, usage = time.perf_counter(), None, "", {}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        for line in connection.getresponse():
            if not line.startswith(b"data: ") or b"[DONE]" in line:
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                first = first or time.perf_counter() - start
        return text, usage, first or time.perf_counter() - start

    def close(self):
        self.process.kill()
        self.process.wait()


def conversation(server, args, seed=0, tools=False, edited=False, settings=None):
    """[(tokens read, new tokens, seconds to the first token)] of each turn."""
    at = 40_000 + seed * 60_000
    messages = [{"role": "system", "content": TEXT[at : at + args.system]}]
    rows, before = [], 0
    for turn in range(args.turns):
        begin = at + args.system + turn * args.message
        role = "tool" if tools and turn % 2 else "user"
        messages.append({"role": role, "content": TEXT[begin : begin + args.message]})
        if edited:
            server.ask(messages, 4, **(settings or {}))
            messages[-1]["content"] = "In other words: " + messages[-1]["content"]
        text, usage, first = server.ask(messages, args.answer, **(settings or {}))
        read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        rows.append((read, usage["prompt_tokens"] - before, first))
        before = usage["prompt_tokens"]
        messages.append({"role": "assistant", "content": text[len(text) // 2 :]})
    return rows


def ways(args):
    """{name: function of a server that gives the rows of its conversations}."""

    def eight(server):
        found = [None] * 8

        def one(i):
            found[i] = conversation(server, args, i)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return {
        "plain": lambda server: [conversation(server, args)],
        "seeded": lambda server: [conversation(server, args, settings={"seed": 1})],
        "tools": lambda server: [conversation(server, args, tools=True)],
        "edited": lambda server: [conversation(server, args, edited=True)],
        "eight": eight,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "qwen35-tiny-4bit"))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--system", type=int, default=4000, help="characters of the system message")
    parser.add_argument("--message", type=int, default=1200, help="characters of each message")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--ways", default="plain,seeded,tools,edited,eight")
    parser.add_argument("--servers", default="ours,stock")
    args = parser.parse_args()
    programs = {"ours": ("turboquant_mlx", "server"), "stock": ("mlx_lm", "server")}
    print("| asked | server | tokens read / new | first token of the last turn, s |\n| --- | --- | ---: | ---: |")
    for way in args.ways.split(","):
        for name in args.servers.split(","):
            server = Server(programs[name], args.model)
            try:
                found = ways(args)[way](server)
            finally:
                server.close()
            # The first turn has nothing to share.
            read, new = (sum(row[i] for rows in found for row in rows[1:]) for i in (0, 1))
            last = statistics.median(rows[-1][2] for rows in found)
            print(f"| {way} | {name} | {read} / {new} = {read / new:.2f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
