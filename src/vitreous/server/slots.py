"""`Slots`: how many requests may wait or be computed at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitreous.errors import RequestError


class Slots:
    """A bounded queue, as a count: who finds no slot free is refused at once, and may come again.

    Args:
        count: How many there are.
        purpose: What they are for, in the plural, for errors.
        on_refuse: Called when a request is refused.
    """

    def __init__(self, count: int, purpose: str, on_refuse: Callable[[], None]):
        self.count = count
        self.purpose = purpose
        self.num_used = 0
        self.on_refuse = on_refuse

    @contextmanager
    def take(self) -> Iterator[None]:
        """Holds a slot for the length of a `with` block.

        Raises:
            RequestError: 503 with Retry-After, if none is free.
        """
        if self.num_used >= self.count:
            self.on_refuse()
            raise RequestError(
                503,
                f"Too busy. Expected at most {self.count} {self.purpose} at a time. Received: one more. "
                "Try again in a second.",
                {"Retry-After": "1"},
            )
        self.num_used += 1
        try:
            yield
        finally:
            self.num_used -= 1
