"""How long training waits for its data: the clock is read twice a batch, where batches are handed out."""
from dataclasses import dataclass

# A fifth: below that even data that came at once would save little. 5 seconds: by then the first batches, for which
# caches and queues were filled, weigh nothing, and a fit that takes less has nothing to win.
SHARE, SECONDS = 0.2, 5.0


@dataclass(slots=True)
class Waiting:
    """Where the seconds of some passes over a loader went; written by `feed`.

    Until the first batch of a pass, workers are started and queues are filled: that is no matter of how fast batches
    come, so it is counted apart, and not at all in the first pass.

    >>> Waiting(waited=3.0, worked=9.0).share
    0.25
    """

    waited: float = 0.0  # for a batch that was not there when it was asked for
    worked: float = 0.0  # between having a batch and asking for the next one
    began: float = 0.0  # until the first batch of each pass but the first one
    n_passes: int = 0

    @property
    def share(self) -> float:
        """The share of the time, 0..1, in which training waited: without the beginnings of passes."""
        return self.waited / (self.waited + self.worked) if self.waited else 0.0

    @property
    def share_of_beginnings(self) -> float:
        """The share of the time, 0..1, that passed until passes had their first batch."""
        return self.began / (self.began + self.waited + self.worked) if self.began else 0.0

    @property
    def is_long(self) -> bool:
        """Whether training has waited long enough to be told of it."""
        return self.waited + self.worked >= SECONDS and self.share >= SHARE

    def begin(self, seconds: float) -> None:
        """A pass has its first batch, `seconds` after it was asked for."""
        if self.n_passes:
            self.began += seconds
        self.n_passes += 1
