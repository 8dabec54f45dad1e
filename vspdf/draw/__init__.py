"""Figures for people: numbers in words, charts as SVG, self-contained pages."""
