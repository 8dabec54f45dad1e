"""How fast it is on this machine, beside opponents at their best."""
