"""Choosing bits for each layer and side, and how many tokens stay exact, within a budget: by measured divergence.

What each layer's keys and each layer's values lose is measured by itself, everything else held as float16.  That orders
all choices on one way (policies.py), whose points are then measured as a whole, through the package's own caches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .. import _core
from ..caches.slots import leaves, own_caches
from ..enable import packing
from ..eval import divergence
from ..eval.modes import parse_mode
from ..eval.reconstruction import theoretical
from ..memory import CacheSizes
from ..overlay.products import fast_attention
from .budget import Budget, parse_budget
from .default import beginning
from .files import Calibrations
from .measure import context_of
from .moments import without_head
from .policies import WIDTHS, Policy, Slot, everywhere, predicted, token_bytes, total_bytes, way

TIERS = ((0, 0), (0, 4), (128, 4), (256, 4))  # (recent, sink) that are tried
GUESSES = (
    1.5,
    1.0,
    0.15,
    0.1,
)  # of what each loses, in what is lost with the first 4 tokens exact: measured soon after
AIM = 0.75  # of the divergence that may be spent, as another text may lose a little more
MOST = 3, 4  # windows to choose with, and to report on
NEAR = 0.98  # bytes that are so near to the fewest found are not looked for
ROUNDS = 5
PROBED = 3  # bits of the side whose loss is measured
ERRORS = {bits: theoretical(bits, "trellis")[1] for bits in WIDTHS}  # squared error of codes of each width

Progress = Callable[[int], None]


def split(tokenizer, text: str, count: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of a text that share no token: (count, length) to calibrate with, some of twice the length (MOST)
    to choose with, and some to report on, each beginning as the model's texts begin.

    Raises ValueError when the text is too short."""
    start = beginning(tokenizer)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    body = length - len(start)
    total = len(ids) // body if body > 0 else 0
    if total < 6:
        raise ValueError(
            f"a choice of bits takes 6 windows of {length} tokens at least; the text has {len(ids)} tokens"
        )
    count = min(count, total // 3)
    places = [(i + 1) * total // count - 1 for i in range(count)]
    gaps = [first + 1 for first, after in zip([-1, *places], places, strict=False) if after - first > 2]

    def cut(at, blocks):
        return np.concatenate([start, ids[at * body : (at + blocks) * body]])

    found = (
        np.stack([cut(n, 1) for n in places]),
        *(np.stack([cut(n, 2) for n in gaps[half::2]][:most]) for half, most in enumerate(MOST)),
    )
    return tuple(x.astype(np.int32) for x in found)  # type: ignore[return-value]


class _Layers:
    """A model's layers, whose outputs are noted once and then handed out again where nothing before them has changed."""

    def __init__(self, model) -> None:
        self.layers = list(model.layers) if len(own_caches(model)) == len(model.layers) else []
        self.outputs: dict[int, Any] = {}
        self.noting, self.first = True, 0  # layers before `first` hand out what was noted

    @contextlib.contextmanager
    def replayed(self):
        """Context: calls of the layers go through here."""
        classes = [type(layer) for layer in self.layers]
        for number, (layer, kind) in enumerate(zip(self.layers, classes, strict=True)):
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": self._call(number, kind)})
        try:
            yield self
        finally:
            for layer, kind in zip(self.layers, classes, strict=True):
                layer.__class__ = kind

    def _call(self, number, kind):
        def call(layer, *args, **named):
            if number < self.first:
                return self.outputs[number]
            found = kind.__call__(layer, *args, **named)
            if self.noting:
                self.outputs[number] = found
            return found

        return call


def _logits(model, window, caches):
    with fast_attention(model):
        logits = model(mx.array(window[None]), cache=caches)[0].astype(mx.float32)
    mx.eval(logits)
    return np.array(logits)


def losses(
    model, calibration, windows: np.ndarray, *, seed: int = 0, progress: Progress = lambda tokens: None
) -> dict[tuple[int, int], float]:
    """What each side of each slot loses by itself: {(slot, 0 for keys or 1 for values): mean divergence at a squared error
    of 1, nats}, over windows (W, L).  The slot's other side is held at 8 bits, all other slots as float16."""
    reference = parse_mode("fp16")
    sink = 4 * _core.reads_exact_copies()
    makers = [
        packing(model, key_bits=k, value_bits=v, calibration=calibration, seed=seed, recent=0, sink=sink)[0]
        for k, v in ((PROBED, 8), (8, PROBED))
    ]
    found = {(slot, side): 0.0 for slot in slots_of(model) for side in (0, 1)}
    layers = _Layers(model)
    with layers.replayed():
        for window in windows:
            layers.noting, layers.first = True, 0
            first = _logits(model, window, reference.make_caches(model))
            progress(len(window))
            layers.noting = False
            for slot, side in found:
                layers.first = slot
                caches = reference.make_caches(model)
                caches[slot] = makers[side]()[slot]
                kld = divergence.figures(first, _logits(model, window, caches), window)[0]
                found[slot, side] += float(kld.mean(dtype=np.float64)) / len(windows)
                progress(len(window))
    return {at: max(loss, 1e-9) / ERRORS[PROBED] for at, loss in found.items()}


def slots_of(model) -> dict[int, Slot]:
    """{slot: its shape} of the slots that are packed; ValueError for models whose slots are no flat list, or are of latent
    attention, whose keys and values are the same codes."""
    caches, (maker, packed) = parse_mode("fp16").make_caches(model), packing(model)
    if maker.latent:
        raise ValueError(
            "[choose] bits are chosen for keys and for values; latent attention has one set of codes for both, in layers "
            f"{', '.join(str(path[0]) for path in sorted(maker.latent))}"
        )
    held = {path: c for path, c in leaves(caches) if path in packed}
    if any(len(path) > 1 for path in held):
        raise ValueError(
            "[choose] bits are chosen for models whose slots are a flat list; this one has lists of caches"
        )
    with fast_attention(model), without_head(model):
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    mx.eval([c.state for _, c in leaves(caches) if not c.empty()])
    return {
        path[0]: Slot(c.keys.shape[1], c.keys.shape[-1], c.values.shape[-1], getattr(c, "max_size", None))
        for path, c in held.items()
        if not c.empty()
    }


def measure(model, calibration, policies: dict[str, Policy], windows, *, seed=0, progress=lambda tokens: None):
    """{name: Record} of float16 ("fp16") and of the caches of each policy, at the second halves of windows (W, L)."""
    parts = []
    for window in windows:
        caches = {"fp16": parse_mode("fp16").make_caches(model)}
        for name, policy in policies.items():
            chosen = Calibrations(calibration)
            chosen.policy = policy
            caches[name] = packing(model, bits="auto", calibration=chosen, seed=seed)[0]()
        parts.append(divergence.compare(model, window[None], caches, prompt=len(window) // 2, progress=progress))
    return {name: divergence.joined([part[name] for part in parts]) for name in parts[0]}


def _room(budget, context):
    """Bytes that the caches may take at `context` tokens."""
    return budget.memory if budget.memory is not None else budget.token_bytes * context


def other_bytes(model, slots, context) -> int:
    """Bytes that the caches beside the packed `slots` take at `context` tokens: recurrent states, and floats that stay."""
    return CacheSizes(model, lambda: own_caches(model)).at(context, without={(slot,) for slot in slots})


def _check_room(slots, budget, context, others):
    """ValueError when the fewest bytes that there are do not keep to the budget."""
    least = total_bytes(slots, everywhere(slots, WIDTHS[0]), context, 0, 0)
    least += others if budget.memory is not None else 0
    if budget.kld is None and least > _room(budget, context):
        raise ValueError(
            f"[choose] {budget} cannot be met: with 2 bits everywhere the caches take {least:,} bytes at {context:,} tokens, "
            f"{least / context:.6g} a token"
        )


class _Search:
    """The search along the way of choices, for each pair of exact tokens."""

    def __init__(self, slots, losses, budget: Budget, context: int, measure):
        self.slots, self.losses, self.budget, self.context = slots, losses, budget, context
        self.way = list(way(slots, losses, ERRORS, context))
        self.predicted = [predicted(losses, ERRORS, widths) for widths in self.way]
        self.measure = measure  # [(place on the way, tier)] -> {(place, tier): mean divergence}
        self.tiers = TIERS if _core.reads_exact_copies() else TIERS[:1]

    def bytes(self, place, tier):
        """Bytes of a choice at the context."""
        return total_bytes(self.slots, self.way[place], self.context, *tier)

    def before(self, aim, scale):
        """The last place on the way before `scale` times what is predicted keeps to `aim`; -1 when the first one does."""
        return max((n for n, loss in enumerate(self.predicted[:-1]) if scale * loss > aim), default=-1)

    def fewest_bytes(self):
        """(place, tier) of the fewest bytes whose divergence keeps to the budget."""
        aim = AIM * self.budget.kld
        scale = {t: guess for t, guess in zip(TIERS, GUESSES, strict=True) if t in self.tiers}
        good = dict.fromkeys(self.tiers, len(self.way))  # the first places known to keep to it
        bad = {t: self.before(aim, scale[t] / 2) for t in self.tiers}  # the last ones known, or taken, not to
        for _ in range(ROUNDS):
            best = min((self.bytes(n, t) for t, n in good.items() if n < len(self.way)), default=math.inf)
            tried = [
                (min(max(self.before(aim, scale[t]), bad[t]) + 1, good[t] - 1), t)
                for t in self.tiers
                if good[t] - bad[t] > 1 and self.bytes(bad[t] + 1, t) < NEAR * best
            ]
            if not tried:
                break
            for (place, t), kld in self.measure(tried).items():
                scale[t] = kld / self.predicted[place]
                (good if kld <= aim else bad)[t] = place
        end = len(self.way) - 1
        if all(n > end for n in good.values()):  # 8 bits everywhere is what is left
            seen = self.measure([(end, t) for t in self.tiers])
            good.update({t: end for (_, t), kld in seen.items() if kld <= aim})
            if all(n > end for n in good.values()):
                raise ValueError(
                    f"[choose] {self.budget} cannot be met: with 8 bits everywhere the divergence is "
                    f"{min(seen.values()):.3g}, and a choice aims at {aim:.3g}"
                )
        found = [(self.bytes(n, t), n, t) for t, n in good.items() if n <= end]
        _, place, tier = min(found)
        return place, tier

    def least_divergence(self):
        """(place, tier) of the least divergence whose bytes keep to the budget."""
        room = _room(self.budget, self.context)
        fits = {t: [n for n in range(len(self.way)) if self.bytes(n, t) <= room] for t in self.tiers}
        tried = [(places[-1], t) for t, places in fits.items() if places]
        seen = self.measure(tried)
        return min(seen, key=lambda at: (seen[at], self.bytes(*at)))


def choose(
    model,
    calibration,
    budget: Budget,
    windows: np.ndarray,
    held_out: np.ndarray,
    *,
    seed: int = 0,
    progress: Progress = lambda tokens: None,
) -> Policy:
    """The bits of each slot's keys and values, and the tokens that stay exact, that keep to a budget.

    Args:
        model: of mlx-lm, its weights as they will be used.
        calibration: {slot: Calibration} of `calibrate`.
        budget: of parse_budget().
        windows: token ids (W, L) to choose with; divergence counts at their second halves.
        held_out: token ids (W, L) that the choice does not see; Policy.measured is of them.
        seed (int): of the caches.
        progress: called with the number of tokens just read.

    Raises:
        ValueError: the budget cannot be met, or slots are no flat list or of latent attention.
    """
    slots = slots_of(model)
    context = budget.context or context_of(model)
    others = other_bytes(model, slots, context)
    _check_room(slots, budget, context, others)
    packed = budget if budget.memory is None else budget._replace(memory=budget.memory - others)
    half = windows.shape[1] // 2
    found = losses(model, calibration, windows[:2, :half], seed=seed, progress=progress)

    def measured(tried):
        policies = {str(at): Policy(search.way[at[0]], at[1][0], at[1][1], str(budget), {}) for at in tried}
        records = measure(model, calibration, policies, windows, seed=seed, progress=progress)
        return {at: float(records[str(at)].kld.mean(dtype=np.float64)) for at in tried}

    search = _Search(slots, found, packed, context, measured)
    place, tier = search.fewest_bytes() if budget.kld is not None else search.least_divergence()
    policy = Policy(search.way[place], tier[0], tier[1], str(budget), {})
    records = measure(model, calibration, {"chosen": policy}, held_out, seed=seed, progress=progress)
    figures = divergence.summarise(records["chosen"], records["fp16"])
    named = ("positions", "mean_kld", "mean_kld_stderr", "perplexity_change", "top1_agreement")
    return policy._replace(
        measured={name: figures[name] for name in named}
        | {
            "context": context,
            "token_bytes": token_bytes(slots, policy.widths),
            "bytes": total_bytes(slots, policy.widths, context, *tier),
            "other_bytes": others,
        }
    )


def described(policy: Policy) -> str:
    """A choice and its measured cost, as lines of text."""
    groups: dict[tuple[int, int], list[int]] = {}
    for slot, pair in policy.widths.items():
        groups.setdefault(pair, []).append(slot)
    lines = [f"chosen for {policy.budget}:"]
    lines += [f"  K{k} V{v}: layers {', '.join(map(str, slots))}" for (k, v), slots in sorted(groups.items())]
    exact = f"the newest {policy.recent} and the first {policy.sink} tokens exact"
    m = policy.measured
    lines.append(f"  {exact}; {m['token_bytes']:,} bytes a token, {m['bytes']:,} bytes at {m['context']:,} tokens")
    if m.get("other_bytes"):
        lines.append(f"  caches that are not packed take {m['other_bytes']:,} bytes beside")
    error = "" if math.isnan(m["mean_kld_stderr"]) else f" +- {m['mean_kld_stderr']:.5f}"
    lines.append(
        f"measured on {m['positions']:,} positions held out from the choice: KLD {m['mean_kld']:.5f}{error}, perplexity "
        f"{m['perplexity_change']:+.2%}, same top token {m['top1_agreement']:.2%}"
    )
    budget = parse_budget(policy.budget)
    if budget.kld is not None and m["mean_kld"] > budget.kld:
        lines.append(
            f"that is more than {budget.kld:g}: another text loses other amounts; ask for less if it must hold there"
        )
    return "\n".join(lines)
