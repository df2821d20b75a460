"""Places the memory of steps in an arena, where what is not needed at the same time shares it."""

from dataclasses import dataclass

from pcnn_lightning.deploy.c.steps import Step, Value


@dataclass(frozen=True)
class Arena:
    """Where each value lies.

    Attributes:
        places: index of the first float or word of each value.
        floats: number of floats.
        words: number of words.
    """

    places: dict[Value, int]
    floats: int
    words: int

    @property
    def size(self) -> int:
        """Number of bytes of the arena in C, a struct of floats and of words of up to 64 bits."""
        return -(-4 * self.floats // 8) * 8 + 8 * self.words


def arrange(steps: list[Step]) -> Arena:
    """Place all values except the output of the last step, which is the caller's.

    The largest come first, each at the lowest place that is free for as long as the value is needed.
    """
    first, last = _lifetimes(steps)
    owners: dict[Value, Value] = {}  # whose memory a value takes
    for now, step in enumerate(steps[:-1]):
        for value in step.may_overwrite:
            owner = owners.get(value, value)
            if last[owner] == now and owner.size == step.output.size:
                owners[step.output], last[owner] = owner, last[step.output]
                break
    values = [value for value in first if value not in owners and value is not steps[-1].output]
    places: dict[Value, int] = {}
    sizes = {False: 0, True: 0}
    for value in sorted(values, key=lambda value: -value.size):
        others = [
            (places[other], places[other] + other.size)
            for other in places
            if other.in_words == value.in_words and first[other] <= last[value] and first[value] <= last[other]
        ]
        place = 0
        for start, end in sorted(others):
            if place + value.size <= start:
                break
            place = max(place, end)
        places[value] = place
        sizes[value.in_words] = max(sizes[value.in_words], place + value.size)
    places |= {value: places[owner] for value, owner in owners.items()}
    return Arena(places, sizes[False], sizes[True])


def _lifetimes(steps: list[Step]) -> tuple[dict[Value, int], dict[Value, int]]:
    """The steps in which each value is written and last needed."""
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for now, step in enumerate(steps):
        for value in (*step.inputs, step.output, *step.scratch):
            if value is not None:
                first.setdefault(value, now)
                last[value] = now
    return first, last
