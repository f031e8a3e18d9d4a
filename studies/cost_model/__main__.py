"""``python -m studies.cost_model``: see :mod:`studies.cost_model.step_cost`."""

from studies.cost_model.step_cost import main

if __name__ == "__main__":
    main()
