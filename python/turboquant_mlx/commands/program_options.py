"""Options of mlx-lm's programs that go beyond the caches' coding: drafts from the text, prefixes on disk, memory."""

import argparse
import functools


def options(command):
    """The options of `command` (generate, chat, server, ...) that are read here."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if command in ("generate", "chat", "server"):
        group = parser.add_argument_group("TurboQuant decoding")
        group.add_argument(
            "--tq-lookup",
            type=_drafts,
            metavar="N",
            help="draft up to N tokens a step from what followed earlier in the text (prompt lookup; a server then answers "
            "one request at a time)",
        )
    return parser


def _drafts(text):
    from ..overlay.lookup import PromptLookup

    try:
        return PromptLookup(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number of tokens from 1 to 64; got {text!r}") from error


def check(args, seen):
    """ValueError for options that exclude each other."""
    if getattr(args, "tq_lookup", None) is not None and seen.draft_model:
        raise ValueError("--tq-lookup and --draft-model exclude each other: both draft")


def install(module, command, args, replaced):
    """Lets mlx-lm's program heed the options; `replaced` gets {name: what was there}, so that the caller puts it back."""
    lookup = getattr(args, "tq_lookup", None)
    if lookup is None:
        return
    if command == "server":
        replaced.setdefault("ModelProvider", module.ModelProvider)
        module.ModelProvider = _drafting(module.ModelProvider, lookup)
        return
    name = "stream_generate" if command == "chat" else "generate"
    replaced[name] = getattr(module, name)
    setattr(module, name, _looking_up(replaced[name], lookup))


def _looking_up(generate, lookup):
    """mlx-lm's `generate` or `stream_generate` with these drafts."""

    @functools.wraps(generate)
    def looking_up(model, tokenizer, prompt, **settings):
        from mlx_lm.models.cache import make_prompt_cache

        if settings.get("prompt_cache") is None:  # mlx-lm forgets max_kv_size beside drafts
            settings["prompt_cache"] = make_prompt_cache(model, settings.get("max_kv_size"))
        return generate(model, tokenizer, prompt, **settings | {"draft_model": lookup})

    return looking_up


def _drafting(provider, lookup):
    """mlx-lm's ModelProvider, whose models come with these drafts."""

    class Drafting(provider):
        def _load(self, *positional, **named):
            super()._load(*positional, **named)
            self.draft_model, self.is_batchable = lookup, False

    return Drafting
