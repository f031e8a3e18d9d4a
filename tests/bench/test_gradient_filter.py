"""bench.gradient_filter: the rows it makes are as peaked as it says, and its figures are of what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gradient_filter


def test_random_rows_have_the_probabilities_that_are_asked_for() -> None:
    rows = gradient_filter.peaked_rows(1024, 600, 64)
    p = torch.softmax(rows.hidden @ rows.weight.T, -1).sort(1, descending=True)[0].mean(0)
    for rank, asked in zip(gradient_filter.RANKS[:4], gradient_filter.PROBABILITIES, strict=False):
        assert float(p[rank - 1]) == pytest.approx(asked, rel=0.25)
    with pytest.raises(ValueError, match="hidden: expected enough"):
        gradient_filter.peaked_rows(80, 600, 64)


@pytest.mark.parametrize("head", [[], ["--frozen"]], ids=["trained", "frozen"])
def test_the_record_holds_every_implementation(tmp_path: Path, head: list[str]) -> None:
    output = tmp_path / "record.json"
    arguments = ["--hidden", "1024", "--vocabulary", "600", "--tokens", "64", "--rounds", "2", "--powers", "4", "24"]
    gradient_filter.main([*arguments, *head, "--output", str(output)])
    record = json.loads(output.read_text())
    results = record["results"]
    assert list(results) == ["bare products", "exact", "2^-4", "2^-24", "plain PyTorch"]
    assert results["bare products"]["ratio"] == 1.0
    assert max(results["exact"]["errors"]) == 0.0
    assert min(results["2^-4"]["errors"]) > 1e-3 > max(results["plain PyTorch"]["errors"])
    # More than half of so small a vocabulary would be kept.
    assert max(results["2^-24"]["errors"]) == 0.0
    assert record["workload"]["trained"] == (not head)


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--hidden", "64"], "--hidden and --vocabulary: expected both or neither"),
        (["--hidden", "64", "--vocabulary", "9", "--tokens", "3"], "--tokens: expected at least 64; got 3"),
    ):
        with pytest.raises(SystemExit):
            gradient_filter.main(arguments)
        assert message in capsys.readouterr().err
