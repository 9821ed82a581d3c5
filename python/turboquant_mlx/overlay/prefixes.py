"""The prompt cache of mlx-lm's server, over caches that go back to checkpoints.

mlx-lm files a request's caches under the tokens that they have read.  The next request takes the caches of the longest
prefix, or trims longer ones to what they share, which it does not for recurrent states.  The functions here replace
mlx-lm's: of all caches on file, the request continues from those that reach furthest, be it at a checkpoint."""

import copy
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from ..caches import leaves
from ..caches.checkpoints import nearest_checkpoint, rewind, tokens_held


def entries(prompt_cache: LRUPromptCache, model: Any) -> list[tuple[list[int], Any]]:
    """(tokens, entry) of all that is on file for a model."""
    filed = [item for order in prompt_cache._lru._lrus.values() for item in order if item[0] == model]
    return [(tokens, prompt_cache._trie.get(model, tokens)) for _, tokens in filed]


def shared_length(a: list[int], b: list[int]) -> int:
    """Tokens that two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a[:low] == b[:low]; what is shared ends at `high` or before
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _reach(filed, entry, usable):
    """How many of the first `usable` tokens the caches filed under `filed` can be brought to hold."""
    if usable == len(filed):
        return usable
    return nearest_checkpoint(entry.prompt_cache, usable) or 0


def fetch_nearest_cache(self: LRUPromptCache, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    """The caches on file that reach furthest into `tokens`, and the tokens that they have not read: at least one."""
    best, found, length = 0, None, 0
    for filed, entry in entries(self, model):
        usable = min(shared_length(filed, tokens), len(tokens) - 1)
        if usable > best and (reached := _reach(filed, entry, usable)) > best:
            best, found, length = reached, entry, len(filed)
    if found is None:
        return None, tokens
    caches = copy.deepcopy(found.prompt_cache)
    if best < length:
        rewind(caches, best)
    return caches, tokens[best:]


def held_tokens(tokens: list[int], caches: list[Any]) -> list[int]:
    """Those of `tokens` that every slot has read."""
    held = [n for _, c in leaves(caches) if (n := tokens_held(c)) is not None]
    return tokens[: min(held)] if held else tokens


def insert_cache(
    self: LRUPromptCache, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
) -> None:
    """Files caches under the tokens that they have read, which need not be all of `tokens`.  Prefixes to which they can
    go back are dropped from the file, and only those."""
    tokens = held_tokens(tokens, prompt_cache)
    held = [n for _, c in leaves(prompt_cache) if (n := tokens_held(c)) is not None]
    if held and max(held) > len(tokens):
        if nearest_checkpoint(prompt_cache, len(tokens)) != len(tokens):
            return  # no request could use it
        rewind(prompt_cache, len(tokens))
    if not tokens:
        return
    for filed, _ in entries(self, model):
        shared = shared_length(filed, tokens)
        if shared == len(filed) and (shared == len(tokens) or nearest_checkpoint(prompt_cache, shared) == shared):
            self._lru.remove(model, filed)
            old = self._trie.pop(model, filed)
            self._n_bytes -= old.nbytes
            self._n_bytes_by_type[old.cache_type] -= old.nbytes
    entry = LRUPromptCache.CacheEntry(prompt_cache, sum(c.nbytes for c in prompt_cache), cache_type)
    self._trie.add(model, tokens, entry)
    self._n_bytes += entry.nbytes
    self._n_bytes_by_type[cache_type] += entry.nbytes
    self._lru.push(model, tokens, cache_type)
    self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)


METHODS: dict[str, Any] = {"fetch_nearest_cache": fetch_nearest_cache, "insert_cache": insert_cache}
