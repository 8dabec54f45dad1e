"""Studies that ship with vspdf: `vspdf compare NAME`."""
