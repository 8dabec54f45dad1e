"""After runs: what they did, alone or side by side, as one page that needs no network."""

from vspdf.report.run_page import refresh, write

__all__ = ["refresh", "write"]
