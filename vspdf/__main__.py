"""``python -m vspdf``: the command line, as `torchrun` starts it on every rank."""

from vspdf.cli import main

if __name__ == "__main__":
    main()
