"""A loaded model made ready for a program: weights' dtype, calibration, packed caches."""

import sys
from pathlib import Path


def _calibration(args, model, where, main, tokenizer):
    """The calibration to use for the model loaded from `where`, or None.  A file that was named is the main model's; where
    there is none, a large model is calibrated now, and a small one that plain codes would ruin."""
    from ..calibration import FILE_NAME, Calibrations, automatic, check_weights, load_calibration, steady_keys
    from ..overlay import sharding

    directory, named = Path(where), main and args.tq_calibration != "auto"
    if args.tq_calibration == "none":
        return None
    if named:
        found = load_calibration(args.tq_calibration, directory=directory if directory.is_dir() else False)
    elif (directory / FILE_NAME).is_file() and not (args.tq_bits == "auto" and _lacks_choice(directory)):
        found = load_calibration(directory)
    elif args.tq_bits == "auto":
        return automatic.chosen(model, seed=args.tq_seed)
    elif args.tq_no_calibrate or tokenizer is None:
        return None
    elif automatic.wanted(model) or (steady_keys(model) and sharding.of(model).group is None):
        return automatic.calibrated(model, tokenizer, seed=args.tq_seed)
    else:
        return None
    try:
        check_weights(found, model)
    except ValueError as error:  # an adapter, say: the folder is the right one, or was not there to be compared
        if named and not directory.is_dir():
            raise
        print(f"[tq] {'used all the same' if named else 'not used'}: {error}", file=sys.stderr)
        if not named:
            return None
    found = Calibrations(found)
    found.weights = frozenset()  # compared above
    return found


def _lacks_choice(directory):
    """Whether the calibration beside the weights came without a choice of bits: one may be kept elsewhere."""
    from ..calibration import load_calibration

    return load_calibration(directory).policy is None


def _describe(calibration):
    """What a calibration adds to the caches, as words."""
    fed = [
        side
        for side, name in (("keys", "key_feedback"), ("values", "value_feedback"))
        if any(getattr(c, name) is not None for c in calibration.values())
    ]
    return ", centred" + (f", feedback of {' and '.join(fed)}" if fed else "")


def coding(args):
    """The arguments of `enable` that say how tokens are stored, but for bits and calibration."""
    return {name: getattr(args, f"tq_{name}") for name in ("key_bits", "value_bits", "code", "seed", "recent", "sink")}


def prepare(model, args, where, max_kv_size=None, main=True, tokenizer=None):
    """The model loaded from `where`, ready to run with packed caches; says on stderr what its slots became.  `main` is
    False of a draft model, and of one that only a server's request names.  With its tokenizer, a model that has no
    calibration may be calibrated now."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import dequantize_model

    from ..calibration import automatic
    from ..enable import enable
    from ..overlay import hosts, sharding
    from .report import summary

    def calibrated():
        calibration = _calibration(args, model, where, main, tokenizer)
        if calibration is None:
            automatic.warn_of_steady_keys(model)
        bits = args.tq_bits
        if bits == "auto" and not main and getattr(calibration, "policy", None) is None:
            bits = 3
            print(f"[tq] no bits were chosen for {where}: it has 3", file=sys.stderr)
        enable(
            model,
            bits,
            **coding(args),
            calibration=calibration or {},  # plain, unless said otherwise
            start=args.tq_start,
            chunked_recurrence=True,
            checkpoints=args.tq_checkpoints or False,
            strict=args.tq_strict,
        )
        return calibration

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if args.tq_dtype == "float32" or (args.tq_dtype == "auto" and on_cpu):
        if sum(v.size for _, v in tree_flatten(model.parameters())) < 200e6:  # small enough to hold as float32
            model = dequantize_model(model)
        model.set_dtype(mx.float32)
    calibration = sharding.agreed_in(sharding.of(model).group, calibrated)
    texts = hosts.language_model(model)
    sized = hasattr(texts.make_cache, "sized")
    if max_kv_size is not None and sized and args.tq_start:
        raise ValueError("--tq-start and --max-kv-size exclude each other: a cache that packs later drops no tokens")
    if max_kv_size is not None and not sized:
        host = "mlx-vlm" if hosts.of_mlx_vlm(model) else "mlx-lm"
        print(f"[tq] --max-kv-size has no effect: {host} lets this model make its own caches", file=sys.stderr)
    extra = _describe(calibration) if calibration else ""
    print(f"[tq] {summary(make_prompt_cache(texts, max_kv_size), texts.make_cache.kept)}{extra}", file=sys.stderr)
    return model
