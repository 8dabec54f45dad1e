"""Event by event on a region of PEs: what moves, computes and waits in every cycle."""
