"""``python -m studies.certificate_coverage``: see :mod:`studies.certificate_coverage.coverage`."""

import sys

from studies.certificate_coverage.coverage import main

if __name__ == "__main__":
    sys.exit(main())
