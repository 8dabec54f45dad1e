"""Every file of a run directory: its name, its writer, its reader."""
