"""Several processes that train one model together: who they are, and the few things that they do in common."""
