"""What gradients to a tolerance share on all backends: passes that list the largest logits of each row."""

from __future__ import annotations

from typing import Self

from mgrpo_kernels.ops._statistics import Wanted
from mgrpo_kernels.ops.linear_token_stats import tiled
from mgrpo_kernels.ops.linear_token_stats.specs import Entries

MAX_ROOM = 4096  # entries listed of a row at most: csrc/cpu/top_entries.h has it too
SMALLEST = 32.0  # an entry is listed from this multiple of tolerance / V on, as a share of the probability beside the row's largest


class ListingPasses(tiled.Passes):
    """Passes that also list the largest logits of each row, in `entries`; a backend's own passes are the second base."""

    def __init__(self, wanted: Wanted, entries: Entries, first_column: int, smallest: float) -> None:
        super().__init__(wanted)
        self.entries, self.first_column, self.smallest = entries, first_column, smallest

    def of_rows(self, rows: slice) -> Self:
        """Return the passes that list the logits of these rows."""
        return type(self)(self.wanted, self.entries.of_rows(rows), self.first_column, self.smallest)
