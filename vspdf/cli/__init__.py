"""The command line: verbs that read arguments, call the library and print. Figures go to stdout, all else to stderr."""

from vspdf.cli.app import main as main
