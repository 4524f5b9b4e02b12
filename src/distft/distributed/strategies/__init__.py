"""How a run spreads its work over processes: one class per strategy. Nothing outside this package branches on a name."""

from distft.distributed.strategies.base import Strategy
from distft.distributed.strategies.selection import choose, strategy_faults, strategy_for

__all__ = ["Strategy", "choose", "strategy_faults", "strategy_for"]
