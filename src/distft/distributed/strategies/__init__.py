"""How a run spreads its work over processes: one class per strategy. Nothing outside this package branches on a name."""

from distft.distributed.strategies.base import Strategy
from distft.distributed.strategies.choose import choose, faults, strategy_for, visible_devices

__all__ = ["Strategy", "choose", "faults", "strategy_for", "visible_devices"]
