"""Which of a run's shards a process computes. Imports no JAX."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which shards a process computes: those whose index is `number` - 1 modulo `of`."""

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(
                f"worker is {self.number}/{self.of}; expected i/n with 1 <= i <= n, such as 2/8"
            )

    def __contains__(self, index: int) -> bool:
        return index % self.of == self.number - 1
