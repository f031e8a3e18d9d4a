"""Every causal architecture that transformers can build tiny: exact under MOPOTrainer, or refused by name."""

from __future__ import annotations

import pytest

from studies.architectures.survey import EXACT, LIMITS, NAMES, NOT_BUILT, PAGE, REFUSED, survey


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_learning_rate_0_an_architecture_is_its_reference_or_is_refused(name):
    result = survey(name)
    if result.state == NOT_BUILT:
        pytest.skip(result.message)
    if result.state == REFUSED:
        assert result.message.startswith("model: "), "by the name of the argument"
        return
    assert result.state == EXACT
    for key, limit in LIMITS.items():
        assert result.errors[key] <= limit, key


def test_the_page_has_every_architecture_that_is_tested_here_and_a_survey_can_fail():
    """Of one of them; `make test-slow` tries all."""
    page = PAGE.read_text(encoding="utf-8")
    assert "| llama | LlamaForCausalLM | yes |" in page
    assert "| opt | OPTForCausalLM | yes |" in page
    result = survey("opt")
    assert result.state == EXACT
    assert all(result.errors[key] <= limit for key, limit in LIMITS.items())
