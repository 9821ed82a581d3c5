"""Which slots of a model can be packed: found by building its graph with packed caches, and what `enable` reports of it."""

import mlx.core as mx

from ..caches import TurboQuantKVCache, TurboQuantLatentKVCache
from ..caches.latent import latent_settings
from ..caches.maker import packed_like
from ..caches.slots import REPLACED, layer_name, own_caches, replace_slots, slot_name
from . import hosts
from .patch import record_reads


class _Probe:
    """Notes what a layer puts into a packed cache and what it is handed."""

    def __init__(self, cache):
        self.failure = self.heads = None
        self.handed_out = []
        self.cache, update = cache, cache.update_and_fetch

        def noted(keys, values):
            try:
                self.heads = keys.shape[1]
                views = update(keys, values)
            except ValueError as error:
                self.failure = str(error)
                raise
            self.handed_out.append(views[0])
            return views

        cache.update_and_fetch = noted

    def read(self, seen):
        """Whether attention read what the cache handed out; of latent caches, whose prompts may be read otherwise, once
        at least."""
        enough = any if isinstance(self.cache, TurboQuantLatentKVCache) else all
        return enough(id(history) in seen for history in self.handed_out)

    def release(self):
        """Undoes the circle of cache and function, which would hold the graph, and so the weights."""
        del self.cache.update_and_fetch, self.cache


def _bare(error):
    """The exception without the frames that it passed through, whose variables hold the model."""
    link = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _probe_once(model, make_cache, left):
    """Builds, without evaluating it, the graphs of two tokens and of one more, with packed caches in all slots but those
    of `left`.  Returns what keeps a slot from being packed, the heads of each slot, and the exception that ended the
    attempt, if one did."""
    probes = {}

    def make(path, c):
        cache = None if path in left else make_cache(path, c)
        if cache is not None:
            probes[path] = _Probe(cache)
        return cache

    error = None
    with record_reads() as seen, hosts.undisturbed(model):
        try:
            caches = replace_slots(own_caches(model), make)
            for tokens in (2, 1):
                model(mx.zeros((1, tokens), mx.int32), cache=caches)
        except Exception as raised:  # whatever a model does with keys that are not arrays
            error = _bare(raised)
    problems = {}
    for path, probe in probes.items():
        if probe.failure:
            problems[path] = probe.failure
        elif probe.handed_out and not probe.read(seen):
            problems[path] = f"its attention does not go through {hosts.attention(model)}" + (
                f" ({type(error).__name__}: {str(error).splitlines()[0]})" if str(error or "") else ""
            )
        probe.release()
    return problems, {path: probe.heads for path, probe in probes.items()}, error


def what_stays(model, make_cache):
    """(What keeps each slot from being packed, the KV heads of each slot or None)."""
    problems, heads = _probe_on(model, make_cache)
    # An attempt that ends blames every slot of its layer that nobody has read yet: each is tried without the others.
    for place in sorted({path[1:] for path in problems if len(path) > 1}):
        others = {path: why for path, why in problems.items() if path[1:] != place}
        if not others:
            continue
        more, seen, error = _probe_once(model, make_cache, others)
        if not more and error is None:
            problems = others
            heads |= {path: n for path, n in seen.items() if n is not None}
    return problems, heads


def _probe_on(model, make_cache):
    """As what_stays().  One slot may end an attempt, so attempts go on without it."""
    problems, heads = {}, {}
    while True:
        more, seen, error = _probe_once(model, make_cache, problems)
        heads |= {path: n for path, n in seen.items() if n is not None}
        if not more:
            if error and (seen or not problems):  # no slot to blame: with the others packed, the model fails
                where = "on packed caches" if _runs_on_its_own(model) else "here, on no caches"
                raise ValueError(
                    f"[enable] the model cannot run {where}: {type(error).__name__}: {error}"
                    + (f"; of slots that stay floats:\n{reasons(problems)}" if problems else "")
                ) from error
            return problems, heads
        problems |= more


def _runs_on_its_own(model):
    """Whether the graph of a token can be built with the model's own caches."""
    with hosts.undisturbed(model):
        try:
            model(mx.zeros((1, 1), mx.int32), cache=own_caches(model))
        except Exception:  # whatever a model cannot do on this device
            return False
    return True


def latent_slots(model, settings, kept, slots, heads):
    """Which of the slots that cannot be packed as keys and values can be as the latent of all heads: of the others `kept`
    gets the reason."""
    tried = {path for path in kept if REPLACED[slots[path]] is TurboQuantKVCache and heads.get(path) == 1}
    if not tried:
        return frozenset()

    def make(path, original):
        if path in tried:
            return TurboQuantLatentKVCache(**latent_settings(settings))
        return None if path in kept else packed_like(original, None, settings)

    problems, _ = what_stays(model, make)
    for path in tried - problems.keys():
        del kept[path]
    return frozenset(tried - problems.keys())


def reasons(problems):
    """Lines of {path: what keeps the slot from being packed}."""
    return "\n".join(f"  {layer_name(path)}: {why}" for path, why in problems.items())


class Enabled(int):
    """What `enable` did: the number of slots that are packed, as an int, and what it left.

    Attributes:
        packed: {slot: class of the cache that it was}, of the slots that are packed.
        kept: {slot: the reason}, of those that could have been packed by their kind and stay as the model made them.

    Slots are named as a calibration names them (`slot_name`).
    """

    packed: dict
    kept: dict

    def __new__(cls, packed, kept):
        self = super().__new__(cls, len(packed))
        self.packed = {slot_name(path): kind for path, kind in packed.items()}
        self.kept = {slot_name(path): why for path, why in kept.items()}
        return self

    def __reduce__(self):
        return int, (int(self),)
