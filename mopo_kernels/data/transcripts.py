"""Turns of a conversation that are written out in one text: by a chat template, or in words."""

from __future__ import annotations

import re

# What chat templates write before a question, and before the assistant's turn.
_TEMPLATE_USER = re.compile(
    r"<\|im_start\|>(?:user|system)\b|<\|start_header_id\|>(?:user|system)<|<\|(?:user|User|prompter|system|USER_TOKEN)\|>"
    r"|<start_of_turn>user\b|<\uff5cUser\uff5c>|\[INST\]"
)
_TEMPLATE_ASSISTANT = (
    r"<\|im_start\|>assistant(?:<\|im_sep\|>)?|<\|start_header_id\|>assistant<\|end_header_id\|>|<\|assistant\|>"
    r"|<start_of_turn>model|<\|Assistant\|>|<\uff5cAssistant\uff5c>|<\|CHATBOT_TOKEN\|>|\[/INST\]"
)
# The same in words; the group "word" may also stand in an answer.
_WORDS_ASSISTANT = (
    r"### (?:Assistant|Response):?|\b(?:ASSISTANT|GPT4 Correct Assistant):|\nAssistant:"
    r"|(?P<word>TL;DR:|### (?:Answer|Output):?|(?:^|\n)(?:AI|Bot|Response|Answer|A):)"
)
ASSISTANT = re.compile(rf"(?:{_TEMPLATE_ASSISTANT}|{_WORDS_ASSISTANT})\n*")

_TEMPLATE_END = re.compile(rf"(?:{_TEMPLATE_ASSISTANT})\s*$")
# Turns in words: one that the user opens, and one of the assistant's that is left open at the end.
_USER_TURN = re.compile(
    r"(?:^|\n)\s*(?:#+ *)?(?:human|user|instruction|prompter)\s*:|\b(?-i:USER|GPT4 Correct User):", re.IGNORECASE
)
_OPEN_TURN = re.compile(
    r"(?:(?:^|\n)\s*(?:#+ *)?(?:assistant|response|bot|ai|gpt)\s*|\b(?-i:ASSISTANT|GPT4 Correct Assistant)):\s*$",
    re.IGNORECASE,
)


def template_header(prompt: str) -> str | None:
    """The header of the assistant's turn at the end of a text that some chat template wrote; None for other text."""
    end = _TEMPLATE_END.search(prompt)
    return end[0].strip() if end and _TEMPLATE_USER.search(prompt, 0, end.start()) else None


def is_transcript(prompt: str) -> bool:
    """Whether a text is a conversation in words up to a turn of the assistant's."""
    return bool(_USER_TURN.search(prompt) and _OPEN_TURN.search(prompt))
