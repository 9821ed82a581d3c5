"""The slots of a model's caches: finding them, naming them, replacing them."""

from mlx_lm.models.cache import KVCache, RotatingKVCache

from .kv_cache import TurboQuantKVCache
from .packed import PackedCache, inner_slots, layer_name, leaves
from .rotating import TurboQuantRotatingKVCache

__all__ = [
    "REPLACED",
    "kv_slots",
    "layer_name",
    "leaves",
    "own_caches",
    "own_make_cache",
    "replace_kv_caches",
    "replace_slots",
    "slot_name",
]

# {kind of slot: what stands in its place}.  overlay/vlm.py adds mlx-vlm's kinds, which have these names too.
REPLACED: dict[type, type[PackedCache]] = {KVCache: TurboQuantKVCache, RotatingKVCache: TurboQuantRotatingKVCache}
# The kinds of caches of models without a make_cache, by the package of their class.
DEFAULT_KINDS: dict[str, tuple[type, type]] = {"mlx_lm": (KVCache, RotatingKVCache)}


def replace_slots(caches, make, path=()):
    """The caches with make(path, cache) in place of each leaf; None leaves it as it is.

    Args:
        caches (list): of a model; a CacheList in it holds further slots.
        make: (path, cache) -> cache or None; path is a tuple of indices, (3,) or (3, 1).

    Returns:
        A new list of the same form.
    """
    out = []
    for i, c in enumerate(caches):
        where = (*path, i)
        inner = inner_slots(c)
        if inner is not None:
            replaced = replace_slots(inner, make, where)
            out.append(tuple(replaced) if isinstance(c, tuple) else type(c)(*replaced))
        else:
            out.append(make(where, c) or c)
    return out


def replace_kv_caches(caches, make):
    """As `replace_slots`, with make(path) in place of each KVCache; other kinds stay, RotatingKVCache too."""
    return replace_slots(caches, lambda path, c: make(path) if type(c) is KVCache else None)


def kv_slots(caches, caller, model="the model"):
    """The slots that `enable` replaces, by their kinds alone: {path: class}, in the order of the layers.

    Raises:
        ValueError: there is none; the message begins with [caller] and `model`, and names the kinds that there are.
    """
    slots = {path: type(c) for path, c in leaves(caches) if type(c) in REPLACED}
    if not slots:
        kinds = sorted({kind_name(type(c)) for _, c in leaves(caches)})
        raise ValueError(f"[{caller}] {model} has no KVCache slot, so there is nothing to compress; it has {kinds}")
    return slots


def kind_name(kind):
    """The name of a class of caches, with its module where that is not mlx-lm's."""
    return kind.__name__ if kind.__module__ == KVCache.__module__ else f"{kind.__module__}.{kind.__name__}"


def default_kinds(model):
    """(class of a whole history, class of a window) of the program that runs the model."""
    return DEFAULT_KINDS.get(type(model).__module__.partition(".")[0], DEFAULT_KINDS["mlx_lm"])


def own_make_cache(model):
    """The model's own make_cache, whether or not enable() was called; None when it has none."""
    ours = vars(model).get("make_cache")
    if not hasattr(ours, "replaced"):
        return getattr(model, "make_cache", None)
    if ours.replaced is not None:
        return ours.replaced
    return type(model).make_cache.__get__(model) if hasattr(type(model), "make_cache") else None


def own_caches(model):
    """New caches of the model's own kinds, as mlx-lm makes them, whether or not `enable` was called: a list."""
    make_cache = own_make_cache(model)
    if make_cache:
        return make_cache()
    return [default_kinds(model)[0]() for _ in model.layers]


def slot_name(path):
    """How a calibration names the slot at `path`: by its index (int), or by the path where it lies in a CacheList."""
    return path[0] if len(path) == 1 else path
