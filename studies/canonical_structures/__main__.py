"""``python -m studies.canonical_structures``: see :mod:`studies.canonical_structures.command`."""

import sys

if __name__ == "__main__":
    try:
        from studies.canonical_structures.command import main  # Here, as Ctrl-C may well come while torch is loaded.

        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
