"""Models whose layers or heads are spread over the ranks of a group: what of a calibration is this rank's, and how the
ranks agree whether caches can be packed."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

_LINEAR = (
    nn.AllToShardedLinear,
    nn.ShardedToAllLinear,
    nn.QuantizedAllToShardedLinear,
    nn.QuantizedShardedToAllLinear,
)
_ROOM = 2000  # bytes of a reason that ranks tell each other


class RankRefused(ValueError):
    """A rank of the group refused; every rank raises this with its reason."""


class Sharding(NamedTuple):
    """How a model is spread: `group` is None for a model that is not."""

    group: mx.distributed.Group | None = None
    tensor: bool = False  # each rank has some heads of every layer
    pipelined: bool = False  # each rank has layers [start, end)
    start: int = 0
    end: int = 0

    def own_slots(self, calibration):
        """{slot here: Calibration} of {slot of the whole model: Calibration}."""
        if not self.pipelined:
            return calibration
        at = {slot: slot[0] if isinstance(slot, tuple) else slot for slot in calibration}
        return {
            (at[slot] - self.start, *slot[1:]) if isinstance(slot, tuple) else slot - self.start: found
            for slot, found in calibration.items()
            if self.start <= at[slot] < self.end
        }

    def own_heads(self, calibration, heads):
        """The calibration of this rank's heads, given {slot: its number of KV heads}."""
        return {slot: self._of_slot(found, heads.get(slot)) for slot, found in calibration.items()}

    def _of_slot(self, found, here):
        rank, size = self.group.rank(), self.group.size()

        def part(x):
            if x is None or here is None or x.shape[0] != here * size:
                return x  # not spread; what does not fit at all is refused by name later
            return mx.contiguous(x[rank * here : (rank + 1) * here])

        parts = found._replace(**{name: part(getattr(found, name)) for name in found._fields if name != "seed"})
        mx.eval([x for x in parts if isinstance(x, mx.array)])
        return parts


def of(model):
    """The Sharding of a model."""
    pipelined = tensor = None
    for module in model.modules():
        if getattr(module, "pipeline_size", 1) > 1:
            pipelined = module
        group = getattr(module, "sharding_group", None) or (module.group if isinstance(module, _LINEAR) else None)
        if group is not None and group.size() > 1:
            tensor = group
    group = tensor or (mx.distributed.init() if pipelined is not None else None)
    if pipelined is None:
        return Sharding(group, tensor is not None)
    return Sharding(group, tensor is not None, True, pipelined.start_idx, pipelined.end_idx)


def agreed(model, prepare):
    """prepare() on every rank of the model's group; (anything, slots that are packed).

    Raises:
        RankRefused: on every rank, when prepare() raised on one of them, or none has a slot; the message is the reason.
        Without a group, whatever prepare() raises.
    """
    return agreed_in(of(model).group, prepare, lambda found: len(found[1]))


def agreed_in(group, prepare, slots=lambda _: 1):
    """prepare() on every rank of `group`, or alone without one; see `agreed`."""
    if group is None or group.size() == 1:
        return prepare()
    found, failure = None, None
    try:
        found = prepare()
    except RankRefused:  # the ranks spoke already
        raise
    except Exception as error:
        failure = error
    told = str(failure or "").encode()[:_ROOM]
    row = [slots(found) if failure is None else 0, int(failure is not None), *told.ljust(_ROOM, b"\0")]
    rows = mx.distributed.all_gather(mx.array([row], mx.int32), group=group, stream=mx.cpu).tolist()
    reasons = {
        rank: bytes(rest).rstrip(bytes(1)).decode(errors="ignore")
        for rank, (_, failed, *rest) in enumerate(rows)
        if failed
    }
    if len(reasons) == group.size() and len({*reasons.values()}) == 1:
        raise RankRefused(reasons[0]) from failure
    if reasons:
        raise RankRefused("\n".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())) from failure
    if not any(count for count, *_ in rows):
        raise RankRefused("[enable] no rank has a KVCache slot that can be packed, so there is nothing to compress")
    return found
