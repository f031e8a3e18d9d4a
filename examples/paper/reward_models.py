"""The public reward models that Rewards-in-Context (RiC, arXiv 2402.10207) measures with, as judges.

What each reads and which of its outputs counts is what RiC's code gives it (github.com/YangRui2015/RiC, at 6fc6d69).
They are loaded at their first score.
"""

from __future__ import annotations

from mopo_kernels.rewards import RewardModel

# The summary prompt of RiC: what is not the post must not reach the summary models.
INSTRUCTION = "### Instruction: Generate a one-sentence summary of this post. ### Input: "
RESPONSE = " ### Response:"
SUMMARY_TEMPLATE = f"{INSTRUCTION}{{post}}{RESPONSE}"


def dialogue(prompt: str, response: str) -> tuple[str, str]:
    """The transcript up to the assistant's turn, and the turn."""
    return prompt, response.strip()


def response_only(prompt: str, response: str) -> tuple[str, None]:
    """The response alone."""
    return response.strip(), None


def summary_then_post(prompt: str, response: str) -> tuple[str, None]:
    """The summary, GPT-2's only special token, the post."""
    return f"{response.strip()} <|endoftext|> {post(prompt)}", None


def summary_and_post(prompt: str, response: str) -> tuple[str, str]:
    """The summary and the post, as a pair."""
    return response.strip(), post(prompt)


def post(prompt: str) -> str:
    """The post in a prompt of ``SUMMARY_TEMPLATE``."""
    return prompt.removeprefix(INSTRUCTION).removesuffix(RESPONSE)


ASSISTANT = {
    "helpful": RewardModel("Ray2333/gpt2-large-helpful-reward_model", texts=dialogue, outputs=1),
    "harmless": RewardModel("Ray2333/gpt2-large-harmless-reward_model", texts=dialogue, outputs=1),
    "humour": RewardModel("mohameddhiab/humor-no-humor", texts=response_only, output=1, outputs=2),
}
"""For prompts of Anthropic/hh-rlhf as transcripts."""

SUMMARY = {
    "summary": RewardModel("Tristan/gpt2_reward_summarization", texts=summary_then_post, outputs=1),
    "faithful": RewardModel("CogComp/bart-faithful-summary-detector", texts=summary_and_post, output=1, outputs=2),
}
"""For prompts made with ``SUMMARY_TEMPLATE``."""
