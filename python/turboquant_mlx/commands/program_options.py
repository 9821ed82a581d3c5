"""Options of mlx-lm's programs that go beyond the caches' coding: drafts from the text, prefixes on disk, memory."""

import argparse
import functools
import math

from ..sizes import read_bytes, read_tokens


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
    if command == "server":
        group = parser.add_argument_group("TurboQuant prefixes on disk")
        group.add_argument(
            "--tq-prefix-dir", metavar="DIR", help="keep the caches of finished requests there, for after a restart"
        )
        group.add_argument(
            "--tq-prefix-bytes",
            type=size,
            metavar="SIZE",
            default=20 * 10**9,
            help="of that directory at most, the least recently used first out (default: 20GB)",
        )
        group = parser.add_argument_group("TurboQuant limits")
        group.add_argument(
            "--tq-memory",
            type=size,
            metavar="SIZE",
            help="of weights, caches and workspace at most, such as 12GB: what cannot fit is refused at start, and requests "
            "that do not fit beside others wait",
        )
        group.add_argument(
            "--tq-context",
            type=tokens,
            metavar="N",
            help="tokens of a prompt and its answer at most; longer prompts are refused (default: none without "
            "--tq-memory, else what fits)",
        )
    return parser


def size(text):
    """Reads a number of bytes: 12GB, 512MB, 3GiB or plain digits."""
    found = read_bytes(text)
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 12GB or 512MB; got {text!r}")
    return int(found)


def tokens(text):
    """Reads a number of tokens, 1 or more; 16k is 16,384."""
    found = read_tokens(text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be a number of tokens, 1 or more; got {text!r}")
    return found


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
    """Lets mlx-lm's program heed the options; `replaced` gets {name: what was there}, so that the caller puts it back.
    Returns what is to be called when the program ends.  OSError when the prefixes' directory cannot be written to."""
    lookup, closing = getattr(args, "tq_lookup", None), []
    if command == "server":
        store = None
        if args.tq_prefix_dir is not None:
            from ..overlay import disk

            store = disk.PrefixStore(args.tq_prefix_dir, args.tq_prefix_bytes)
            closing.append(store.close)
            replaced["LRUPromptCache"] = module.LRUPromptCache
            module.LRUPromptCache = disk.stored(module.LRUPromptCache, store)
        replaced.setdefault("ModelProvider", module.ModelProvider)
        module.ModelProvider = _provider(module.ModelProvider, lookup, store)
        if args.tq_memory is not None or args.tq_context is not None:
            from ..overlay import limits

            given = limits.Limits(args.tq_memory, args.tq_context)
            closing.append(given.close)
            module.ModelProvider = limits.provider(module.ModelProvider, given)
            replaced.setdefault("ResponseGenerator", module.ResponseGenerator)
            module.ResponseGenerator = limits.generator(module.ResponseGenerator, given)
    elif lookup is not None:
        name = "stream_generate" if command == "chat" else "generate"
        replaced[name] = getattr(module, name)
        setattr(module, name, _looking_up(replaced[name], lookup))
    return closing


def _looking_up(generate, lookup):
    """mlx-lm's `generate` or `stream_generate` with these drafts."""

    @functools.wraps(generate)
    def looking_up(model, tokenizer, prompt, **settings):
        from mlx_lm.models.cache import make_prompt_cache

        if settings.get("prompt_cache") is None:  # mlx-lm forgets max_kv_size beside drafts
            settings["prompt_cache"] = make_prompt_cache(model, settings.get("max_kv_size"))
        return generate(model, tokenizer, prompt, **settings | {"draft_model": lookup})

    return looking_up


def _provider(provider, lookup, store):
    """mlx-lm's ModelProvider, whose models come with these drafts and know this store of prefixes; either may be None."""

    class Provider(provider):
        def _load(self, *positional, **named):
            super()._load(*positional, **named)
            if store is not None:
                store.use([model for model in (self.model, self.draft_model) if model is not None])
            if lookup is not None:
                self.draft_model, self.is_batchable = lookup, False

    return Provider
