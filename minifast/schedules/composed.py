"""Schedules made of shapes and of other schedules."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.state import State
from ..errors import check_items, check_number
from .scheduler import Scheduler
from .shapes import Shape, piece_at


@dataclass(frozen=True)
class PiecewiseLR(Scheduler):
    """Schedules one after the other, each over its share of the steps.

    pieces: (share, schedule) pairs; the shares are > 0 and add up to 1, the schedules own the same hyper-parameters.
    Raises ValueError otherwise.

    >>> from minifast import CosineAnnealing, LinearLR
    >>> warm_up_then_cosine = PiecewiseLR([(0.2, LinearLR(0.1, 1.0)), (0.8, CosineAnnealing(warmup_frac=0))])
    >>> [round(lr, 3) for lr in warm_up_then_cosine.values(10)["lr"]][:4]
    [0.1, 0.55, 1.0, 0.962]
    """

    pieces: Sequence[tuple[float, Scheduler]]

    def __post_init__(self) -> None:
        try:
            pieces = tuple((share, piece) for share, piece in check_items("pieces", self.pieces, "pairs"))
        except (TypeError, ValueError):
            pieces = ((1, None),)  # refused in the next line
        if not all(isinstance(piece, Scheduler) for _, piece in pieces):
            raise TypeError(f"pieces must be (share, schedule) pairs, got {self.pieces!r:.80}.")
        total = sum(check_number(f"the share in pieces[{i}]", pair[0], above=0, maximum=1)
                    for i, pair in enumerate(pieces))
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"the shares of the pieces must add up to 1, got {total:g}.")
        owned = [piece.owns for _, piece in pieces]
        if len(set(owned)) > 1:
            raise ValueError(f"the pieces must own the same hyper-parameters, got {', '.join(map('+'.join, owned))}.")
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "owns", owned[0])

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        i, start, end = piece_at(step, n_steps, [share for share, _ in self.pieces])
        return self.pieces[i][1].value(hyper, step - start, end - start)

    def cycle_ends(self, n_steps: int) -> tuple[int, ...]:
        """Where the cycles of the pieces end in a falling rate (a warm-up is no cycle), and the last step."""
        ends, start = {n_steps - 1}, 0
        while start < n_steps and "lr" in self.owns:
            i, _, end = piece_at(start, n_steps, [share for share, _ in self.pieces])
            ends |= {start + last for last in self.pieces[i][1].cycle_ends(end - start)
                     if last and self.value("lr", start + last, n_steps) < self.value("lr", start + last - 1, n_steps)}
            start = end
        return tuple(sorted(ends))


@dataclass(frozen=True)
class Schedule(Scheduler):
    """Any hyper-parameter as a function of (step, n_steps): `Schedule({"lr": cosine, "weight_decay": linear})`.

    shapes: hyper-parameter -> function of the 0-based step and the number of steps, or the name of one, with its
    function as `shape`. "lr" and "weight_decay" are fractions of each group's own (so norms and biases stay without
    decay); "momentum", and any other key of the optimizer's param_groups, is the value itself. All but the learning
    rate is restored when the fit ends. Raises TypeError for what cannot be called, and ValueError before the fit for a
    hyper-parameter that the optimizer does not have.

    >>> from minifast.schedules import cosine
    >>> [round(wd, 3) for wd in Schedule("weight_decay", cosine).values(4)["weight_decay"]]
    [1.0, 0.854, 0.5, 0.146]
    """

    shapes: Mapping[str, Shape] | tuple[tuple[str, Shape], ...] | str
    shape: Shape | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shapes: Any = {self.shapes: self.shape} if isinstance(self.shapes, str) else self.shapes
        if isinstance(shapes, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in shapes):
            shapes = dict(shapes)  # the form in which it is kept
        if not (isinstance(shapes, Mapping) and shapes):
            raise TypeError(f"Schedule takes a name and a shape, or a dict of them, got {self.shapes!r:.80}. "
                            'Pass e.g. Schedule("weight_decay", cosine).')
        for hyper, shape in shapes.items():
            if not callable(shape):
                raise TypeError(f"the shape of {hyper!r} must be a function of (step, n_steps), got {shape!r:.80}.")
        object.__setattr__(self, "shapes", tuple(shapes.items()))  # hashable, as a value should be
        object.__setattr__(self, "shape", None)
        object.__setattr__(self, "owns", tuple(shapes))

    def before_fit(self, state: State) -> None:
        super().before_fit(state)
        for hyper in self.owns:
            if hyper != "momentum" and not all(hyper in group for group in state.opt.param_groups):
                raise ValueError(f"{type(state.opt).__name__} has no {hyper!r} to schedule. It has "
                                 f"{', '.join(state.opt.defaults)}.")

    def __repr__(self) -> str:
        """With the names of its functions, not their addresses: Schedule({'lr': cosine})."""
        shapes = [f"{hyper!r}: {getattr(shape, '__name__', repr(shape))}" for hyper, shape in self.shapes]  # type: ignore[str-unpack]
        return f"Schedule({{{', '.join(shapes)}}})"

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return float(dict(self.shapes)[hyper](step, n_steps))  # type: ignore[arg-type]
