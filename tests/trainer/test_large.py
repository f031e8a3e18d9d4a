"""A model of 1.4 billion parameters on this machine: minutes and gigabytes, so `make test-slow` only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from memory_child import measured

CONFIG = Path(__file__).parents[2] / "configs" / "phi_1b_lora.yaml"
LIMIT = 12e9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_steps_of_lora_on_1_4_billion_parameters_fit_in_12_gigabytes(tmp_path):
    """4 prompts with 4 responses each a step, as the configuration is but for its data and the length of the run."""
    (found,) = measured(
        [
            [
                *("--config", str(CONFIG), "--random_weights", "true", "--output_dir", str(tmp_path)),
                *("--max_steps", "2", "--gradient_accumulation_steps", "1", "--eval_fraction", "0"),
                *("--random_data", "examples=8,responses=4,prompt_length=64,response_length=64"),
                *("--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"),
                *("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"),
            ]
        ]
    )
    assert (tmp_path / "adapter_model.safetensors").is_file()
    print(found)
    assert found["peak"] < LIMIT
    assert found["estimated"] / (found["peak"] - found["before"]) == pytest.approx(1, abs=0.15)
