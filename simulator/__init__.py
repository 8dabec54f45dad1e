"""The CS-2 dataflow simulator: reserved. It reads a run's `patterns.npz` and the ledger, never torch."""
