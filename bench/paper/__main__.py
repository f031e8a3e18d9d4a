"""``python -m bench.paper``: see :mod:`bench.paper.command`."""

import sys

if __name__ == "__main__":
    try:
        from bench.paper.command import main  # Here, as Ctrl-C may well come while torch is loaded.

        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
