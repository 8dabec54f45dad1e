"""A Cerebras CS-2 as a simulator: event by event on a region, and in closed form on the whole wafer."""
