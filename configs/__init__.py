"""Configurations that ship with vspdf: `vspdf train NAME`."""
