"""Win rates of one policy over another: sample from both, let judges score the samples, compare with intervals.

A *judge* scores one response to one prompt; a higher score is better. One that also has ``score_batch(prompts,
responses)``, such as ``rewards.RewardModel``, is given many at once. The *win rate* of a candidate over a baseline on
one prompt is the share of (candidate sample, baseline sample) pairs in which the candidate's score is the higher, a tie
counting one half; over prompts it is the mean. It estimates P_k of docs/method.md, section 1, with the baseline in
place of mu and the judge's order in place of p_k. Prompts, not samples, are the independent units, so intervals
resample prompts.

transformers and peft are imported when a policy is loaded, not before: scoring responses needs numpy alone.
"""

from __future__ import annotations

from mopo_kernels.evaluation.compare import (
    Comparison,
    LengthStatistics,
    compare_policies,
    compare_responses,
    compare_with_baseline,
    length_statistics,
)
from mopo_kernels.evaluation.judges import BatchJudge, Judge, judge_responses, load_judges
from mopo_kernels.evaluation.policies import (
    SWEEP_FILE,
    Policy,
    is_adapter,
    is_sweep,
    load_policy,
    load_sweep_policies,
    read_sweep,
)
from mopo_kernels.evaluation.progress import progress_bar
from mopo_kernels.evaluation.prompts import Prompt, encode_prompt, load_prompts, prompt_text
from mopo_kernels.evaluation.sampling import Draw, draw_responses, sample_responses
from mopo_kernels.evaluation.win_rates import Difference, WinRate, win_rate, win_rate_by_prompt, win_rate_difference

__all__ = [
    "SWEEP_FILE",
    "BatchJudge",
    "Comparison",
    "Difference",
    "Draw",
    "Judge",
    "LengthStatistics",
    "Policy",
    "Prompt",
    "WinRate",
    "compare_policies",
    "compare_responses",
    "compare_with_baseline",
    "draw_responses",
    "encode_prompt",
    "is_adapter",
    "is_sweep",
    "judge_responses",
    "length_statistics",
    "load_judges",
    "load_policy",
    "load_prompts",
    "load_sweep_policies",
    "progress_bar",
    "prompt_text",
    "read_sweep",
    "sample_responses",
    "win_rate",
    "win_rate_by_prompt",
    "win_rate_difference",
]
