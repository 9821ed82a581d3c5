"""What a model's caches hold, as a table."""

from ..caches import PackedCache, leaves


def _codes(key_bits, value_bits, code):
    """Widths and codes as words."""
    if not isinstance(code, str):
        return f"K{key_bits} {code[0]} V{value_bits} {code[1]}"
    return f"K{key_bits} V{value_bits}" + (" scalar" if code == "scalar" and min(key_bits, value_bits) < 4 else "")


_COLUMNS = ("layer", "cache", "bits", "tokens", "bytes", "float16", "ratio", "kernel")


def _row(path, cache):
    layer = ".".join(map(str, path))
    if not isinstance(cache, PackedCache):
        return (
            layer,
            type(cache).__name__,
            "-",
            str(cache.size() or "-"),
            f"{cache.nbytes:,}",
            "-",
            "-",
            "-",
        )
    note = cache.inspect()
    resident, plain = note["resident_bytes"], note["float16_bytes"]
    return (
        layer,
        note["kind"],
        _codes(note["key_bits"], note["value_bits"], note["code"]) if note["key_bits"] else "-",
        str(note["tokens"]),
        f"{resident:,}",
        f"{plain:,}",
        f"{plain / resident:.2f}x" if resident else "-",
        note["kernel"] or "-",
    )


def table(caches):
    """One line a slot: kind of cache, bits, tokens, resident bytes, the same tokens as float16, last kernel."""
    rows = [_COLUMNS, *(_row(path, c) for path, c in leaves(caches))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    left = (1, 7)  # words; the rest are numbers
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def summary(caches, kept=None):
    """The kinds of slots, as one line; `kept` has the reasons of slots that could not be packed, {path: reason}."""
    kinds = {}
    for path, c in leaves(caches):
        if isinstance(c, PackedCache):
            kind = f"{type(c).__name__} {_codes(c.key_bits, c.value_bits, c.code)}"
        elif path in (kept or {}):
            kind = f"{type(c).__name__} kept: {kept[path].removeprefix('[encode] ')}"
        else:
            kind = type(c).__name__ + " (kept)"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
