"""In closed form on the whole wafer: programs, layers and training steps."""
