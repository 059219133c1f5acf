"""The self-balancing weight of the localisation term, kept in float64 whatever casts the model."""

import math
import sys
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn


class SelfBalance(nn.Module):
    """Self-balancing (Sec. 4.2): the weight of loc is mean(aLRP) / mean(loc) of the previous epoch.

    The statistics stay on the device of the losses (they move there once; nothing waits for it) and
    are saved in `state_dict`. `ALRPLoss` counts an iteration if it is in training mode and
    gradients are enabled: so a validation under `no_grad` is left out, and so is an iteration whose
    loss is not finite. A call of `update` by hand always counts.

    The statistics are float64 and stay so. They are held by their bits, in buffers of integers,
    which `half`, `bfloat16`, `to(dtype)` and the mixed precision of FSDP leave alone. On a device
    without float64 (Apple's MPS) each is a pair of float32 numbers. Made on the meta device, they
    begin anew when `to_empty` gives them memory; `reset_parameters` does the same at any time.

    Outside of the module that DistributedDataParallel wraps, each rank balances on what it sees;
    inside, all take rank 0's, whose buffers are broadcast. `AveragedModel` copies the statistics;
    with `use_buffers=True` it averages their bits, roughly, which is no mean of the weights.

    Args:
        initial: weight in the first epoch (50 in the paper, which finds it to hardly matter).
        period: number of iterations after which an epoch ends by itself; None if the caller says so
            with `step()`.

    Raises:
        TypeError, ValueError: if initial is no positive number, or period no integer from 1 on.

    Example:
        >>> balance = SelfBalance(initial=50.0)
        >>> balance.update(torch.tensor(0.9), torch.tensor(0.1))
        >>> balance.step()                           # the epoch ends
        >>> round(balance.weight.item(), 4)
        10.0
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "sums"]

    _weight: Tensor
    _sums: Tensor
    iterations: Tensor

    def __init__(self, initial: float = 50.0, period: int | None = None) -> None:
        super().__init__()
        self.initial = _check_initial(initial)
        self.period = _check_period(period)
        for name, shape in (("_weight", ()), ("_sums", (2,))):
            bits = torch.empty(shape, dtype=torch.int64)
            self.register_buffer(name, bits, persistent=False)  # saved as what they mean, below
        self.register_buffer("iterations", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin anew, with the initial weight."""
        _write(self._weight, torch.full_like(self.weight, self.initial))
        self._sums.zero_()
        self.iterations.zero_()
        # Known to the host, for the warning: the length of the positives, not what they hold.
        self._calls = 0
        self._seen_positive = False
        self._warned = False

    @property
    def weight(self) -> Tensor:
        """The weight of loc, a float64 scalar (float32 on a device without float64)."""
        return _read(self._weight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._weight = _to_bits(value)

    @property
    def sums(self) -> Tensor:
        """(2,) the sums of aLRP and loc since the epoch began."""
        return _read(self._sums)

    @sums.setter
    def sums(self, value: Tensor) -> None:
        self._sums = _to_bits(value)

    def weight_of(self, loc: Tensor) -> Tensor:
        """Return a copy of the weight for loc, in its dtype, on its device.

        The statistics move to that device.
        """
        self._follow(loc.device)
        return self.weight.to(loc.device, loc.dtype, copy=True)

    @torch.no_grad()
    def update(self, cls: Tensor, loc: Tensor, num_positives: int = 1) -> None:
        """Add one iteration: its cls and loc (scalars), and how many positives it had.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        _check_scalar("cls", cls)
        _check_scalar("loc", loc)
        if loc.device != cls.device:
            raise ValueError(f"loc: expected on {cls.device} like cls, got {loc.device}")
        self._follow(cls.device)
        cls, loc = cls.to(self.sums.dtype), loc.to(self.sums.dtype)
        total = cls + loc
        _add(self._sums, torch.where(total.isfinite(), torch.stack([total, loc]), 0.0))
        self.iterations.add_(1)
        if self.period is not None:
            self._end_epoch(self.iterations >= self.period)
        if not torch.compiler.is_compiling():
            _check_number("num_positives", num_positives, Integral, "an integer")
            self._calls += 1
            self._seen_positive = self._seen_positive or num_positives > 0
            if self._calls == self.period:
                self._warn_without_positives()

    @torch.no_grad()
    def step(self) -> None:
        """End an epoch: the weight becomes the ratio of what was summed since the last one.

        It stays as it was if nothing was localised, and warns once if no positive was ever seen.
        """
        self._warn_without_positives()
        self._end_epoch(self.iterations > 0)

    def _end_epoch(self, ends: Tensor) -> None:
        total, loc = self.sums
        ratio = total / loc
        usable = ends & (loc > 0) & (ratio < math.inf)
        _write(self._weight, torch.where(usable, ratio, self.weight))
        self._sums.masked_fill_(ends, 0)
        self.iterations.masked_fill_(ends, 0)

    def _warn_without_positives(self) -> None:
        if self._seen_positive or self._warned:
            return
        self._warned = True
        warnings.warn(
            "SelfBalance: no positive was seen so far, the weight of the localisation loss stays "
            "at its initial value; check the assignment of targets",
            stacklevel=3,
        )

    def _follow(self, device: torch.device) -> None:
        """Move to the losses: from another device each iteration would wait for a copy."""
        if self._sums.device == device or torch.compiler.is_compiling():
            return
        with torch.inference_mode(False):  # tensors made in that mode could not be updated later
            if self._sums.is_meta:
                self.to_empty(device=device)
            else:
                self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelfBalance":
        def move(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)  # Module.type casts integers too

        before = self._weight, self._sums
        super()._apply(move, recurse)
        if before[0].is_meta and not self._weight.is_meta:
            self.reset_parameters()
        elif lacks_float64(before[0].device) != lacks_float64(self._weight.device):
            device = self._weight.device
            self._weight, self._sums = (_to_bits(_to_float64(x), device) for x in before)
        return self

    def _saved(self) -> dict[str, Any]:
        """Return what `state_dict` holds: the buffers, the numbers among them as float64."""
        weight, sums = _to_float64(self._weight), _to_float64(self._sums)
        return {"weight": weight, "sums": sums, "iterations": self.iterations}

    def _save_to_state_dict(self, *arguments: Any) -> None:
        buffers = self._buffers
        self._buffers = self._saved()
        try:
            super()._save_to_state_dict(*arguments)
        finally:
            self._buffers = buffers

    def _load_from_state_dict(self, *arguments: Any) -> None:
        buffers, saved = self._buffers, self._saved()
        self._buffers = loaded = dict(saved)
        try:
            super()._load_from_state_dict(*arguments)
        finally:
            self._buffers = buffers
        for name in saved:
            if loaded[name] is not saved[name]:  # load_state_dict(assign=True)
                setattr(self, name, loaded[name])
            elif name != "iterations" and lacks_float64(self.iterations.device):
                buffers[f"_{name}"] = _to_bits(loaded[name], self.iterations.device)
            # Else it was written into a view of the bits.

    def extra_repr(self) -> str:
        """Return what repr() shows."""
        return f"period={self.period}"


def recomputes() -> bool:
    """Return whether a checkpoint (`use_reentrant=False`) runs a forward pass again, in backward.

    The iteration was counted the first time. With `use_reentrant=True` it was not, since that first
    runs without gradients. The innermost of both decides; torch tells it nowhere but on the stack.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("unpack_hook", "backward") and code.co_filename == _CHECKPOINT:
            return code.co_name == "unpack_hook"
        frame = frame.f_back
    return False


_CHECKPOINT = torch.utils.checkpoint.__file__


def lacks_float64(device: torch.device) -> bool:
    """Return whether a device holds numbers as pairs of float32.

    The second of a pair is what the first rounds away.
    """
    return device.type == "mps"


def _pairs(bits: Tensor) -> Tensor:
    return bits.unsqueeze(-1).view(torch.float32)


def _read(bits: Tensor) -> Tensor:
    """Return the numbers, as a view where there is float64."""
    return _pairs(bits).sum(-1) if lacks_float64(bits.device) else bits.view(torch.float64)


def _write(bits: Tensor, numbers: Tensor) -> None:
    """Write numbers of the dtype that `_read` gives."""
    if not lacks_float64(bits.device):
        bits.view(torch.float64).copy_(numbers)
        return
    high, low = _pairs(bits).unbind(-1)
    high.copy_(numbers)
    low.zero_()


def _add(bits: Tensor, numbers: Tensor) -> None:
    if not lacks_float64(bits.device):
        bits.view(torch.float64).add_(numbers)
        return
    high, low = _pairs(bits).unbind(-1)
    total = high + numbers
    added = total - high
    rest = (high - (total - added)) + (numbers - added) + low  # what `total` rounds away, exactly
    high.copy_(total + rest)
    low.copy_(rest - (high - total))


def _to_float64(bits: Tensor) -> Tensor:
    """Return the numbers, exactly: those of a device without float64 on the CPU."""
    return _pairs(bits.cpu()).double().sum(-1) if lacks_float64(bits.device) else _read(bits)


def _to_bits(numbers: Tensor, device: torch.device | None = None) -> Tensor:
    """Return what holds these numbers on the device, by default their own."""
    device = numbers.device if device is None else device
    if not lacks_float64(device):
        return numbers.to(device, torch.float64).view(torch.int64)
    numbers = numbers.cpu().double()
    high = numbers.float()
    pairs = torch.stack([high, (numbers - high).float()], -1)
    return pairs.view(torch.int64).squeeze(-1).to(device)


def _check_number(name: str, given: object, kind: type, expected: str) -> None:
    if isinstance(given, bool) or not isinstance(given, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(given).__name__}")


def _check_initial(initial: float) -> float:
    _check_number("initial", initial, Real, "a number")
    try:
        number = float(initial)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"initial: expected a positive number, got {number}")
    return number


def _check_period(period: int | None) -> int | None:
    if period is None:
        return None
    _check_number("period", period, Integral, "None or an integer")
    if not 1 <= period < 2**63:
        raise ValueError(f"period: expected None or at least 1 (below 2^63), got {period}")
    return int(period)


def _check_scalar(name: str, given: Tensor) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {kind}")
    if given.dim() != 0:
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(given.shape)}")
