"""What `enable` puts in the place of a model's make_cache."""

import copy
import weakref

from mlx_lm.models.cache import ArraysCache

from .arguments import window_coding
from .checkpoints import CheckpointedArraysCache
from .convert import DelayedTurboQuantKVCache
from .identity import Names
from .latent import TurboQuantLatentKVCache, latent_settings
from .rotating import PackedWindow
from .slots import REPLACED, default_kinds, leaves, own_caches, replace_slots, slot_name


def packed_like(original, start, coding):
    """The packed cache that stands in for `original`; None for kinds that stay."""
    packed = REPLACED.get(type(original))
    if packed is None:
        return None
    if issubclass(packed, PackedWindow):
        return packed(original.max_size, original.keep, **window_coding("enable", original.max_size, coding))
    return DelayedTurboQuantKVCache(start, **coding) if start else packed(**coding)


class CacheMaker:
    """Makes a model's caches, packed ones in their places: `model.make_cache` of an enabled model.

    It holds the model weakly, for the model holds it: a dropped model is gone with its last reference.  A deep copy or
    a pickle of the model has a maker of its own.

    Args:
        model: whose caches it makes.
        settings (dict): bits, key_bits, value_bits, code, seed, recent and sink, as TurboQuantKVCache takes them.
        extras: {slot of this process: its centres and feedback, as keywords}.
        start (int): tokens held as floats first, or None.
        kept: {path: the reason} of slots that stay as they are though their kind could be packed.
    """

    def __init__(self, model, settings, extras, start, kept=None):
        self._model = weakref.ref(model)
        self.settings, self.extras, self.start, self.kept = settings, extras, start, kept or {}
        self.names = Names(model)
        self.layers = None  # the model's, when `extras` were numbered by them
        self.replaced = None  # a make_cache that somebody had set on this very model
        self.latent = frozenset()  # paths of slots of latent attention
        self.limits = None  # of the checkpoints of recurrent states; None: those stay ArraysCaches
        self.uncounted = frozenset()  # paths of recurrent states whose layers do not count their tokens

    @property
    def model(self):
        """The model; RuntimeError when it is gone."""
        model = self._model()
        if model is None:
            raise RuntimeError(
                "[make_cache] the model that enable() was called for is gone; call enable() for this one"
            )
        return model

    def of(self, model):
        """This maker, or its like for a shallow copy of its model."""
        if self._model() is model:
            return self
        other = CacheMaker(model, self.settings, self.extras, self.start, self.kept)
        other.replaced, other.layers = self.replaced, self.layers
        return other._chosen_like(self)

    def _chosen_like(self, other):
        self.limits, self.uncounted, self.latent = other.limits, other.uncounted, other.latent
        return self

    def coding(self, path):
        """What a packed cache at `path` is made with, as keywords."""
        return self.settings | self.extras.get(slot_name(path), {})

    def unfilled(self, path, original, start=None):
        """The packed cache that takes the place of `original` at `path`; None where that stays."""
        if path in self.latent:
            return TurboQuantLatentKVCache(**latent_settings(self.coding(path)))
        return None if path in self.kept else packed_like(original, start, self.coding(path))

    def _packed(self, caches):
        if (self.extras or self.kept) and self.layers not in (None, len(self.model.layers)):
            raise RuntimeError(
                f"[make_cache] enable() saw {self.layers} layers and chose among their slots, now there are "
                f"{len(self.model.layers)}: call enable() after pipeline()"
            )
        name = self.names.latest or self.names.current()  # looked at again when the first tokens come

        def make(path, original):
            if type(original) is ArraysCache and self.limits and path not in self.uncounted:
                return CheckpointedArraysCache(len(original.cache), limits=self.limits)
            cache = self.unfilled(path, original, self.start)
            if cache is not None:
                cache.fingerprint, cache._names = name, self.names
            return cache

        caches = replace_slots(caches, make)
        first = next((c for _, c in leaves(caches) if getattr(c, "_names", None) is self.names), None)
        if first is not None:
            first._leads = True
        return caches

    def __call__(self):
        return self._packed(own_caches(self.model))

    @property
    def sized(self):
        """sized(max_kv_size) makes windows; mlx-lm gives max_kv_size only to models without a make_cache."""
        if self.replaced is not None or hasattr(type(self.model), "make_cache"):
            raise AttributeError("[make_cache] this model sizes its own caches")
        return self._windows

    def _windows(self, max_kv_size):
        if self.start:
            raise ValueError(f"[enable] start = {self.start} and max_kv_size = {max_kv_size} exclude each other")
        if self.latent:
            raise ValueError(
                f"[make_cache] max_kv_size = {max_kv_size} needs caches that drop tokens, and latent attention's cannot"
            )
        window = default_kinds(self.model)[1]
        return self._packed([window(max_size=max_kv_size, keep=4) for _ in self.model.layers])

    def __deepcopy__(self, memo):
        model = self._model()
        other = CacheMaker(memo.get(id(model), model), self.settings, self.extras, self.start, self.kept)
        other.replaced, other.layers = copy.deepcopy(self.replaced, memo), self.layers
        return other._chosen_like(self)

    def __reduce__(self):
        return (
            CacheMaker,
            (self.model, self.settings, self.extras, self.start, self.kept),
            {
                "replaced": self.replaced,
                "layers": self.layers,
                "limits": self.limits,
                "uncounted": self.uncounted,
                "latent": self.latent,
            },
        )
