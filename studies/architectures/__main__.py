"""``python -m studies.architectures``: see :mod:`studies.architectures.survey`."""

from studies.architectures.survey import main

if __name__ == "__main__":
    main()
