"""From text and tasks to samples, in one order that depends on nothing but seed and index."""
