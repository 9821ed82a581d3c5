"""Calibration: what a short text tells about a model's keys and values, for codes that cost less.

Centres are the means of keys (after RoPE) and values, a constant vector per layer and KV head that is taken from them
before they are coded.  Softmax does not see a constant added to every key, and one taken from every value is added back
once to the output, so what remains to be coded is smaller at no cost in the loop over tokens.  Feedback (feedback.py)
lets the encoder put its errors where attention hardly looks, at no cost after encoding.  docs/quality.md has what both
buy.  They are constants of a model: they do not depend on how a prompt is chunked, batched or restored, and they are
part of a cache's identity.

A map (balance.py) spreads keys as evenly as the queries that ask them.

    found = calibrate(model, tokens)                      # {slot: Calibration}
    save_calibration(found, directory)                    # a file beside the weights
    enable(model, bits=3, calibration=directory)          # or the file, or `found`

Bits can be chosen for each layer's keys and values, within a budget (budget.py, choice.py); the choice stands in the file,
and enable(model, bits="auto", calibration=directory) takes it.

Where nobody calibrated, `enable` and the command line do (automatic.py).
"""

from . import automatic, policies
from .default import calibrate_by_default, steady_keys
from .files import (
    FILE_NAME,
    FORMAT,
    NO_CALIBRATION,
    Calibration,
    Calibrations,
    as_calibration,
    check_weights,
    content,
    directory_hash,
    load_beside,
    load_calibration,
    save_calibration,
)
from .measure import calibrate

fingerprint = directory_hash  # its former name

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "NO_CALIBRATION",
    "Calibration",
    "Calibrations",
    "as_calibration",
    "automatic",
    "calibrate",
    "calibrate_by_default",
    "check_weights",
    "content",
    "directory_hash",
    "fingerprint",
    "load_beside",
    "load_calibration",
    "policies",
    "save_calibration",
    "steady_keys",
]
