"""How a run spreads its work over processes. Each strategy is a class; no module branches on a strategy's name."""

from distft.distributed.strategies.base import Strategy
from distft.distributed.strategies.selection import choose, strategy_faults, strategy_for

__all__ = ["Strategy", "choose", "strategy_faults", "strategy_for"]
