"""Before a run: its stages, FLOPs, memory and time, here and on a CS-2."""

from vspdf.plan.planner import plan as plan
