"""Bodies of OpenAI requests, checked before mlx-lm's or mlx-vlm's server reads them.

Both ignore parameters that they do not know (`n`, `echo`, `response_format`, ...), and read values that they cannot use.
Here each parameter is served, or refused with ValueError, which the servers answer with status 400.  A null is a
parameter that was not given, as in OpenAI's API."""

import json
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
Rule = Callable[[Body, str], None]  # raises ValueError, or makes the body say what the server understands


def checked(raw: bytes, rules: dict[str, Rule]) -> bytes:
    """The body that the server shall read instead of `raw`.

    Args:
        raw: a request's body, JSON.
        rules: what holds of each parameter; a parameter without a rule goes through.

    Raises:
        ValueError: it is no JSON object, or a parameter has a value that the server would ignore or break on.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"the body must be JSON; {error}") from None
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object; got {type(body).__name__}")
    body = {name: value for name, value in body.items() if value is not None}
    for name, rule in rules.items():
        if name in body:
            rule(body, name)
    return json.dumps(body).encode()


def openai_error(status: int, message: str) -> Body:
    """An error's body as OpenAI's clients read it: they show `message`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _refuse(name: str, rule: str, value: object) -> None:
    shown = repr(value)
    raise ValueError(f"{name} must be {rule}; got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def number(least: float, most: float = float("inf"), *, whole: bool = False) -> Rule:
    """A finite number from `least` to `most`."""
    kinds = int if whole else (int, float)
    kind = "a whole number" if whole else "a number"
    span = f"of at least {least}" if most == float("inf") else f"from {least} to {most}"

    def rule(body: Body, name: str) -> None:
        value = body[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            _refuse(name, f"{kind} {span}" if least > float("-inf") else kind, value)

    return rule


def only(*allowed: object, why: str) -> Rule:
    """One of `allowed`, which is also what the server does without the parameter; it is dropped."""

    def rule(body: Body, name: str) -> None:
        value = body.pop(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            _refuse(name, f"{' or '.join(json.dumps(one) for one in allowed)} here: {why}", value)

    return rule


def kind(words: str, *types: type) -> Rule:
    """A value of one of `types`."""

    def rule(body: Body, name: str) -> None:
        if type(body[name]) not in types:
            _refuse(name, words, body[name])

    return rule


def refused(why: str) -> Rule:
    """No value but an empty one."""

    def rule(body: Body, name: str) -> None:
        if value := body.pop(name):
            _refuse(name, f"left out: {why}", value)

    return rule


def _messages(body: Body, name: str) -> None:
    messages = body[name]
    if not isinstance(messages, list) or not messages:
        _refuse(name, "a list of at least one message", messages)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(name, "objects that each have a role", message)
        if not isinstance(message.get("content"), (str, list, type(None))):
            _refuse(name, "objects whose content is a string or a list of parts", message)
        for part in message.get("content") or []:
            if isinstance(message["content"], list) and not isinstance(part, dict):
                _refuse(name, "objects whose parts of content are objects", part)


def _stop(body: Body, name: str) -> None:
    words = body[name]
    if not isinstance(words, str) and not (isinstance(words, list) and all(isinstance(w, str) for w in words)):
        _refuse(name, "a string or a list of strings", words)


def _seed(body: Body, name: str) -> None:
    if type(body[name]) is not int or not 0 <= body[name] < 2**64:
        _refuse(name, "from 0 to 2^64 - 1", body[name])


def _stream_options(body: Body, name: str) -> None:
    options = body[name]
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        _refuse(name, 'an object like {"include_usage": true}', options)
    body[name] = {**options, "include_usage": bool(options.get("include_usage"))}


def _tools(body: Body, name: str) -> None:
    tools = body[name]
    named = isinstance(tools, list) and all(
        isinstance(t, dict) and isinstance(t.get("function"), dict) and isinstance(t["function"].get("name"), str)
        for t in tools
    )
    if not named:
        _refuse(name, 'a list of {"type": "function", "function": {"name": ...}}', tools)


def _logit_bias(body: Body, name: str) -> None:
    bias = body[name]
    if not isinstance(bias, dict):
        _refuse(name, "an object of token ids to numbers", bias)
    for token, value in bias.items():
        if not token.isascii() or not token.lstrip("-").isdigit():
            _refuse(name, "an object of token ids to numbers", token)
        number(float("-inf"))({f"{name}[{token}]": value}, f"{name}[{token}]")


def _response_format(structured: Callable[[], str | None]) -> Rule:
    """Text, or what `structured` finds nothing against."""

    def rule(body: Body, name: str) -> None:
        value = body[name]
        form = value.get("type") if isinstance(value, dict) else None
        if form == "text":
            del body[name]
        elif form not in ("json_object", "json_schema"):
            _refuse(name, 'an object of type "text", "json_object" or "json_schema"', value)
        elif why := structured():
            _refuse(name, f'{{"type": "text"}} here: {why}', value)
        elif form == "json_schema":
            schema = value.get("json_schema")
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                _refuse(name, "given with a schema in json_schema", value)

    return rule


_ONE = "this server gives one answer a request"
COMMON: dict[str, Rule] = {
    "model": kind("a string", str),
    "messages": _messages,
    "n": only(1, why=_ONE),
    "best_of": only(1, why=_ONE),
    "echo": only(False, why="this server does not repeat the prompt"),
    "suffix": refused("this server does not fill in"),
    "modalities": only(["text"], why="this server answers with text"),
    "audio": refused("this server answers with text"),
    "functions": refused("tools have taken its place"),
    "function_call": refused("tool_choice has taken its place"),
    "stop": _stop,
    "stream": kind("true or false", bool),
    "stream_options": _stream_options,
    "tools": _tools,
    "parallel_tool_calls": only(True, why="this server cannot keep the model from calling several tools"),
    "logit_bias": _logit_bias,
    "max_tokens": number(1, whole=True),
    "max_completion_tokens": number(1, whole=True),
    "temperature": number(0),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "top_k": number(0, whole=True),
    "seed": _seed,
    "presence_penalty": number(float("-inf")),
    "frequency_penalty": number(float("-inf")),
    "repetition_penalty": number(0),
}


def _prompt(body: Body, name: str) -> None:
    """One string; a list of one is served as that one."""
    prompt = body[name]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        body[name] = prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be one string; got {type(prompt).__name__}")


def _chosen_tools(body: Body, name: str) -> None:
    """The model chooses, or there are no tools."""
    choice = body.pop(name)
    if choice == "none":
        body.pop("tools", None)
    elif choice != "auto":
        _refuse(name, '"auto" or "none" here: mlx-lm\'s server cannot make the model call a tool', choice)


MLX_LM: dict[str, Rule] = {
    **COMMON,
    "prompt": _prompt,
    "tool_choice": _chosen_tools,
    "response_format": _response_format(lambda: "mlx-lm's server does not constrain what the model writes"),
}


def mlx_vlm(structured: Callable[[], str | None], most_logprobs: Callable[[], int]) -> dict[str, Rule]:
    """The rules of mlx-vlm's server.

    Args:
        structured: why it cannot constrain answers to a schema, or None.
        most_logprobs: top_logprobs that it gives at most.
    """

    def top_logprobs(body: Body, name: str) -> None:
        number(0, whole=True)(body, name)
        if body[name] > most_logprobs():
            _refuse(name, f"at most {most_logprobs()} here: vlm-server's --top-logprobs-k sets it", body[name])

    def max_completion_tokens(body: Body, name: str) -> None:
        COMMON[name](body, name)
        body["max_tokens"] = body.pop(name)

    return {
        **COMMON,
        "stop": refused("mlx-vlm's server has no stop words"),
        "max_completion_tokens": max_completion_tokens,
        "top_logprobs": top_logprobs,
        "response_format": _response_format(structured),
    }
