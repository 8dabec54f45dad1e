"""A Cerebras CS-2 as a simulator: event by event on a region, and in closed form on the whole wafer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vspdf.simulator.dispatch import simulate as simulate

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:
    """On first use: layers and steps need neither the compiled core nor what draws."""
    if name == "simulate":
        from vspdf.simulator.dispatch import simulate

        return simulate
    raise AttributeError(f"module 'vspdf.simulator' has no attribute '{name}'")
