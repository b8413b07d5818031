"""`python -m pipeline.cli` is the command `headcast`."""

from __future__ import annotations

from pipeline.cli import main

if __name__ == "__main__":
    main()
