"""`python -m nascompile`: for launchers, which start modules."""

from __future__ import annotations

from nascompile.cli import main

if __name__ == "__main__":
    main()
