"""How an example becomes text and token ids: through the model's chat template, or as it stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mopo_kernels.data.schema import (
    DataError,
    Message,
    PreferenceExample,
    PreferencePair,
    Text,
    as_messages,
    check_template_kwargs,
    response_parts,
    response_text,
    shown,
)
from mopo_kernels.data.transcripts import is_transcript, template_header

CHAT = ("auto", "always", "never")
CONTROL_TOKENS = ("neutralize", "refuse")

# What a template or a tokenizer may raise over a row that it does not take.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# A place in a text that no token spans: a character that Unicode reserves for use inside a program.
_BREAK = "\ufdd0"
# Contents that are looked for in what a template makes of them.
_ASKED, _ANSWERED = "What is asked 4711", "What is answered 4711"
_NO_TEMPLATE = "as no chat template is applied to its text"


class RenderedExample(NamedTuple):
    """An example as text.

    ``form`` is ``turns`` (through the chat template), ``rendered`` (a template was applied before), ``completion`` (the
    responses continue the prompt) or ``text`` (other strings as they stand); ``ends`` says of each of ``wholes``, which
    are the prompt with each response, whether it has its end token already.
    """

    prompt: str
    wholes: list[str]
    ends: list[bool]
    form: str


class RenderedTokens(NamedTuple):
    """Token ids of a rendered example: the prompt's, and each response's with its end token.

    ``neutralized``: whether a text held control tokens, which are now ordinary text. ``left_out``: tokens at the end of
    the prompt that are others when a response follows, and so belong to the responses.
    """

    prompt: list[int]
    responses: list[list[int]]
    form: str
    neutralized: bool
    left_out: int


class _Template(NamedTuple):
    """What a chat template writes around contents: before a conversation's first, after the user's (without and with
    the assistant's header), and after the assistant's: all of it, what goes up to the end token, and that one's id."""

    openings: tuple[str, ...]
    asked: str
    headed: tuple[str, ...]
    answered: str
    ending: str
    end_id: int | None


@dataclass
class Renderer:
    """Writes examples as the model is to see them, and tokenises prompt and response as one text.

    Messages go through the chat template. The token that ends a response is the one that the template writes after the
    assistant's turn, the tokenizer's EOS where it writes none, and there is one of them, whatever the row has already.
    What a template writes after it is left out: the model is not asked for it. The prompt is what its own tokens share
    with those of prompt and response together, as in TRL; so tokens may span the boundary, and what a template writes
    between the generation prompt and a response, such as an empty think block, belongs to the response. The template is
    told an example's ``tools`` and its ``chat_template_kwargs``, which go before those for all; what it does not use of
    them is an error.

    Args:
        tokenizer: a ``transformers`` tokenizer with an EOS token.
        chat: what a prompt that is a string is. ``always``: a user's turn. ``never``: text that the responses continue,
            as in TRL. ``auto``: a user's turn, but text where the template was applied before (it begins and ends as
            the template writes a prompt), where the turns are written out ("Human: ... Assistant:"), or where every
            response begins with a space and the prompt does not end a sentence; what another template wrote is refused.
            Without a chat template, always text.
        control_tokens: what of control tokens inside the texts of a conversation, by which a text could open a turn of
            its own: ``neutralize`` encodes them as ordinary text, ``refuse`` raises. Text that stands as it is keeps
            them.
        chat_template_kwargs: variables for the template, such as ``{"enable_thinking": False}``.

    Raises:
        ValueError: an unknown choice, messages without a chat template, or a variable that the template does not use.
        DataError: a row that the template refuses or does not write whole, text of another template, an empty response
            where no turn ends, or a control token that is refused.
    """

    tokenizer: Any
    chat: str = "auto"
    control_tokens: str = "neutralize"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("chat", CHAT), ("control_tokens", CONTROL_TOKENS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")
        self.chat_template_kwargs = check_template_kwargs(self.chat_template_kwargs) or {}
        template = str(self.tokenizer.chat_template or "")
        if unused := [name for name in self.chat_template_kwargs if name not in template]:
            raise ValueError(f"chat_template_kwargs: expected variables that the chat template uses; got {unused[0]!r}")

    # ----------------------------------------------------------------------------------------------- what is written

    def render(self, example: PreferenceExample) -> RenderedExample:
        """The texts of one example."""
        try:
            form = self._form(example.prompt, example.responses)
            options = self._template_options(example, form)
            return self._render_turns(example, options) if form == "turns" else self._render_text(example, form)
        except DataError as error:
            raise error.of(example.name) from error.__cause__

    def _render_text(self, example: PreferenceExample, form: str) -> RenderedExample:
        prompt = example.prompt
        assert isinstance(prompt, str)
        end = self._template.ending if form == "rendered" and not self.writes_no_end else ""
        for index, response in enumerate(example.responses):
            place = f"responses[{index}]"
            if parts := response_parts(response):
                raise DataError(f"expected text, {_NO_TEMPLATE}; got {next(iter(parts))}", field=place)
            if not response_text(response) and not end:
                raise DataError(
                    "is empty, and the text before it is no turn that a chat template ends (chat=always takes the "
                    "prompt for a user's turn)",
                    field=place,
                )
        written = [self._ended(response_text(response), end) for response in example.responses]
        return RenderedExample(prompt, [prompt + text for text, _ in written], [ended for _, ended in written], form)

    def _render_turns(self, example: PreferenceExample, options: Mapping[str, Any]) -> RenderedExample:
        messages, prompt = self._write_prompt(example.prompt, options)
        wholes = []
        for index, response in enumerate(example.responses):
            place = f"responses[{index}]"
            parts = response_parts(response)
            turn = {"role": "assistant", "content": self._without_end(response_text(response)), **parts}
            turns = [*messages, self._neutral(turn, place)]
            whole = self._apply(turns, options, place, False)
            for name in parts:
                self._check_written(turns, len(messages), name, options, whole, place)
            wholes.append(self._cut(whole, options))
        return RenderedExample(prompt, [text for text, _ in wholes], [ended for _, ended in wholes], "turns")

    def _write_prompt(self, prompt: Text, options: Mapping[str, Any]) -> tuple[list[Message], str]:
        """A prompt's messages, and what the template makes of them. DataError where it leaves one out."""
        messages: list[Message] = self._neutral(as_messages(prompt), "prompt")
        text = self._apply(messages, options, "prompt", True)
        parts = [
            (index, name)
            for index, message in enumerate(messages)
            for name in ("content", "tool_calls")
            if message.get(name) and (name != "content" or message["role"] not in ("user", "assistant"))
        ]
        if parts:
            kind = json.dumps([[message["role"] for message in messages], parts, sorted(options)])
            if kind not in self._complete:
                for index, name in parts:
                    self._check_written(messages, index, name, options, text, f"prompt[{index}]")
                self._complete.add(kind)
        return messages, text

    def _check_written(
        self, messages: list[Message], index: int, name: str, options: Mapping[str, Any], text: str, place: str
    ) -> None:
        """DataError unless another value of a message's part makes another text of the conversation."""
        message = messages[index]
        call = {"type": "function", "function": {"name": _ASKED, "arguments": {}}}
        other = [call] if name == "tool_calls" else _ASKED
        changed = [*messages[:index], {**message, name: other}, *messages[index + 1 :]]
        try:
            if self._apply(changed, options, place, index + 1 < len(messages)) != text:
                return
        except DataError:
            return  # it is read
        raise DataError(
            f"expected none, as the chat template does not write it in a message of {shown(message['role'])}; got some",
            field=f"{place}.{name}",
        )

    def _form(self, prompt: Text, responses: Sequence[Text]) -> str:
        if not isinstance(prompt, str):
            if not self.tokenizer.chat_template:
                raise ValueError(
                    "tokenizer: expected a chat template, as the prompts are lists of messages (hh-rlhf can be loaded "
                    "with conversational=False); got one without a chat template"
                )
            return "turns"
        if not self.tokenizer.chat_template:
            return "text"
        if self.chat == "always":
            return "turns"
        if self._is_rendered(prompt, responses):
            return "rendered"
        if self.chat == "never":
            return "text"
        if header := template_header(prompt):
            raise DataError(
                f"expected a question, or text that the tokenizer's own chat template wrote; got {header} at the end, "
                "as another template writes it (chat=always takes the text for a user's turn, chat=never as it stands)",
                field="prompt",
            )
        return "completion" if _continues(prompt, [response_text(response) for response in responses]) else "turns"

    def _is_rendered(self, prompt: str, responses: Sequence[Text]) -> bool:
        """Whether a prompt begins and ends as the template writes one."""
        template = self._template
        text = prompt.strip()
        if (bos := self.tokenizer.bos_token) and text.startswith(bos):
            text = text[len(bos) :].lstrip()
        if not any(text.startswith(opening) for opening in template.openings):
            return False
        if text.endswith(template.headed):
            return True
        # The header may stand before each response instead.
        header = min(template.headed, key=len, default="").removeprefix(template.asked).strip()
        return (
            bool(header)
            and text.endswith(template.asked)
            and bool(responses)
            and all(response_text(response).lstrip().startswith(header) for response in responses)
        )

    def _template_options(self, example: PreferenceExample, form: str) -> dict[str, Any]:
        """What the template is told beside the messages of an example. DataError for what of it would not be
        written."""
        own = {f"chat_template_kwargs.{name}": value for name, value in (example.chat_template_kwargs or {}).items()}
        own |= {} if example.tools is None else {"tools": example.tools}
        if not own:
            return dict(self.chat_template_kwargs)
        template = self.tokenizer.get_chat_template(tools=example.tools) if form == "turns" else ""
        values = {}
        for place, value in own.items():
            name = place.removeprefix("chat_template_kwargs.")
            if name not in template:
                reason = "as the chat template does not use it" if template else _NO_TEMPLATE
                raise DataError(f"expected none, {reason}; got some", field=place)
            values[name] = self._neutral(value, place)
        return {**self.chat_template_kwargs, **values}

    def _apply(self, messages: list[Message], options: Mapping[str, Any], place: str, generation: bool) -> str:
        """The template's text; the one place where a conversation is rendered."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **options
            )
        except _REFUSALS as error:
            raise DataError(f"the chat template refuses it: {error}", field=place) from error
        return text

    @cached_property
    def _template(self) -> _Template:
        """What the template writes around contents."""
        return self._read_template(self.chat_template_kwargs)

    def _read_template(self, told: Mapping[str, Any]) -> _Template:
        """What the template writes around contents when it is told this, read off a conversation of one question and
        one answer."""
        asked: Message = {"role": "user", "content": _ASKED}
        answered: Message = {"role": "assistant", "content": _ANSWERED}

        def around(messages: list[Message], content: str, generation: bool = False, **options: Any) -> tuple[str, str]:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **{**told, **options}
            )
            before, _, after = text.rpartition(content)
            return before, after

        try:
            opening, after = around([asked], _ASKED)
            headed = {
                around([asked], _ASKED, True)[1].strip(),
                around([asked], _ASKED, True, enable_thinking=False)[1].strip(),
            }
            before, last = around([asked, answered], _ANSWERED)
            headed.add(before.rpartition(_ASKED)[2].strip())
        except _REFUSALS as error:
            raise ValueError(
                f"tokenizer: expected a chat template that takes a user's and an assistant's turn; got {error}"
            ) from error
        openings = {opening}
        try:
            openings.add(around([{"role": "system", "content": _ANSWERED}, asked], _ANSWERED)[0])
            # Some templates write more after the last turn than after others.
            followed = around([asked, answered, asked], _ANSWERED)[1]
            # And some open a conversation with a system prompt of their own, which text may lack.
            openings.add(followed[_agreement(last, followed) :].partition(_ASKED)[0])
        except _REFUSALS:
            followed = last
        bos = self.tokenizer.bos_token or ""
        ending, end_id = self._first_end([last[: _agreement(last, followed)], last])
        return _Template(
            tuple(text for each in openings if (text := each.strip().removeprefix(bos).strip())),
            after.strip(),
            tuple(text for text in headed if text),
            last,
            ending,
            end_id,
        )

    def _first_end(self, endings: Sequence[str]) -> tuple[str, int | None]:
        """What of the first ending that has an added token goes up to it, those that follow it at once included, and
        the id of the last; without any, the text of the last ending."""
        added = sorted(self._added, key=len, reverse=True)
        for ending in endings if added else ():
            if found := re.search(f"(?:{'|'.join(map(re.escape, added))})+", ending):
                last = next(token for token in added if found[0].endswith(token))
                return ending[: found.end()], self._added[last]
        return endings[-1].rstrip(), None

    @cached_property
    def _added(self) -> dict[str, int]:
        """Tokens that are found in a text before anything else, with their ids; not white space, which some models
        have among them."""
        added = self.tokenizer.added_tokens_decoder
        return {token.content: index for index, token in added.items() if not token.content.isspace()}

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """Those of the added tokens that stand for no text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special and token.content in self._added)

    @cached_property
    def _complete(self) -> set[str]:
        """Kinds of conversations, all of which the template writes."""
        return set()

    # ---------------------------------------------------------------------------------- end tokens and control tokens

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the template's end token, if it writes one, and EOS."""
        own = self._template.end_id if self.tokenizer.chat_template else None
        return tuple(dict.fromkeys(index for index in (own, self.tokenizer.eos_token_id) if index is not None))

    @property
    def writes_no_end(self) -> bool:
        """Whether the template writes no token that ends the assistant's turn."""
        return self._template.end_id is None

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        written = self.tokenizer.chat_template and self._template.end_id is not None
        return tuple(
            text for text in (self._template.ending.strip() if written else "", self.tokenizer.eos_token) if text
        )

    def _without_end(self, text: str) -> str:
        """``text`` without the end tokens that it has already."""
        while end := next((end for end in self._end_texts if text.rstrip().endswith(end)), None):
            text = text.rstrip()[: -len(end)]
        return text

    def _ended(self, text: str, end: str) -> tuple[str, bool]:
        """``text`` with the first of the end tokens that it has already, else with ``end``; and whether there is
        one."""
        bare = self._without_end(text)
        found = next((each for each in self._end_texts if text[len(bare) :].startswith(each)), end)
        return bare + found, bool(found)

    def _cut(self, whole: str, options: Mapping[str, Any]) -> tuple[str, bool]:
        """A conversation up to the end token of its last turn; and whether there is one."""
        template = self._template
        if not whole.endswith(template.answered) and options != self.chat_template_kwargs:
            # With tools, say, it may end a turn in another way.
            template = self._read_template(options)
        if not whole.endswith(template.answered):
            # A call of a tool may end in a token of its own.
            bare = whole.rstrip()
            return (bare, True) if bare.endswith(self._special) else (whole, False)
        return whole.removesuffix(template.answered) + template.ending, template.end_id is not None

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches special tokens, and what else of the added ones the template writes around contents."""
        template = self._template
        written = (*template.openings, template.asked, template.ending)
        tokens = [token for token in self._added if token in self._special or any(token in text for text in written)]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def _neutral(self, value: Any, place: str) -> Any:
        """``value``, a text, message or list, with a break inside every control token of its texts."""
        if isinstance(value, Mapping):
            return {self._neutral(key, place): self._neutral(item, place) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._neutral(item, place) for item in value]
        if not isinstance(value, str):
            return value
        if _BREAK in value:
            raise DataError("expected no character U+FDD0, which is no text; got one", field=place)
        while found := self._control.search(value):
            if self.control_tokens == "refuse" or len(found[0]) == 1:
                raise DataError(
                    f"expected no control token of the tokenizer in its text; got {found[0]!r} "
                    "(control_tokens=neutralize takes longer ones for ordinary text)",
                    field=place,
                )
            value = self._control.sub(lambda token: f"{token[0][:1]}{_BREAK}{token[0][1:]}", value)
        return value

    # ------------------------------------------------------------------------------------------------------ token ids

    def tokenize(self, examples: Sequence[PreferenceExample]) -> list[RenderedTokens]:
        """Token ids of each example; every text is tokenised with the others in one call."""
        rendered = [self.render(example) for example in examples]
        heads = [self._head(item) for item in rendered]
        ids = iter(
            self._encode(
                [
                    (text, item.form != "turns")
                    for item, head in zip(rendered, heads, strict=True)
                    for text in (head, *(text[len(head) :] for text in (item.prompt, *item.wholes)))
                ]
            )
        )
        result = []
        for item in rendered:
            head, prompt = next(ids), self._open(next(ids), item.prompt)
            wholes = [
                self._open(next(ids), text) if ended else self._closed(next(ids))
                for text, ended in zip(item.wholes, item.ends, strict=True)
            ]
            # A token at least is left to every response.
            shared = min(min(_agreement(prompt, whole), len(whole) - 1) for whole in wholes)
            result.append(
                RenderedTokens(
                    head + prompt[:shared],
                    [whole[shared:] for whole in wholes],
                    item.form,
                    any(_BREAK in text for text in (item.prompt, *item.wholes)),
                    len(prompt) - shared,
                )
            )
        return result

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Token ids of a prompt alone, ready for a response to follow."""
        return self._opening_ids(prompt, self._form(prompt, ()), self.chat_template_kwargs)

    def example_prompt_ids(self, example: PreferenceExample) -> list[int]:
        """Token ids of an example's prompt, ready for another response to follow."""
        form = self._form(example.prompt, example.responses)
        return self._opening_ids(example.prompt, form, self._template_options(example, form))

    def _opening_ids(self, prompt: Text, form: str, options: Mapping[str, Any]) -> list[int]:
        text = self._write_prompt(prompt, options)[1] if form == "turns" else prompt
        assert isinstance(text, str)
        return self._open(self._encode([(text, form != "turns")])[0], text)

    def _head(self, item: RenderedExample) -> str:
        """What of a prompt and its wholes can be tokenised once for all of them, without a token being another."""
        if item.form != "turns" or not self._tail or not item.prompt.endswith(self._tail):
            return ""
        head = item.prompt.removesuffix(self._tail)
        return head if all(whole.startswith(item.prompt) for whole in item.wholes) else ""

    @cached_property
    def _tail(self) -> str:
        """The end of what the template writes after a question, from its last added token on, at which a tokenizer cuts
        every text; empty where there is none, or where this tokenizer's tokens are others after the cut."""
        messages = [{"role": "user", "content": _ASKED}]
        answered = [*messages, {"role": "assistant", "content": _ANSWERED}]
        prompt = self._apply(messages, self.chat_template_kwargs, "prompt", True)
        whole = self._apply(answered, self.chat_template_kwargs, "responses", False)
        plain = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content in self._added and not (token.lstrip or token.rstrip or token.single_word)
        ]
        start = max((prompt.rfind(token) for token in plain), default=-1)
        if start <= prompt.rfind(_ASKED) or not whole.startswith(prompt):
            return ""
        head, *rest = self._encode([(text, False) for text in (prompt[:start], prompt[start:], whole[start:])])
        return prompt[start:] if [head + ids for ids in rest] == self._encode([(prompt, False), (whole, False)]) else ""

    def _encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of texts, with the tokenizer's own opening and closing tokens where asked for: but text that begins
        with BOS is given no other. Elsewhere no token spans a break."""
        ids: list[list[int]] = [[] for _ in texts]
        bos = self.tokenizer.bos_token
        for special in (False, True):
            pieces = [
                (place, piece)
                for place, (text, asked) in enumerate(texts)
                if special == (asked and not (bos and text.startswith(bos)))
                for piece in ([text] if asked else text.split(_BREAK))
                if piece
            ]
            if pieces:
                found = self.tokenizer([piece for _, piece in pieces], add_special_tokens=special)["input_ids"]
                for (place, _), part in zip(pieces, found, strict=True):
                    ids[place] += part
        return ids

    def _open(self, ids: list[int], text: str) -> list[int]:
        """The ids of ``text`` without the EOS that some tokenizers close every text with."""
        eos = self.tokenizer.eos_token_id
        own = text.rstrip().endswith(self.tokenizer.eos_token)
        return ids[:-1] if ids[-1:] == [eos] and (not own or ids[-2:] == [eos, eos]) else ids

    def _closed(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def fingerprint(self) -> str:
        """Tells renderers apart: the tokenizer's rules, its template, the options, and the ids of an example.

        The ids show what the rest does not: a template that writes today's date.
        """
        tokenizer = self.tokenizer
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            rules = json.loads(backend.to_str())
            # What the last call asked for, not what the tokenizer is.
            del rules["padding"], rules["truncation"]
        else:
            rules = sorted(tokenizer.get_vocab().items())
        prompts: list[Text] = ["Name a fruit."]
        prompts += [as_messages(prompts[0])] if tokenizer.chat_template else []
        pair = PreferencePair(0, 1, {"any": 1.0})
        ids = self.tokenize([PreferenceExample(prompt, ("An apple.", "A pear."), (pair,)) for prompt in prompts])
        content = [
            rules,
            tokenizer.chat_template,
            [tokenizer.bos_token, tokenizer.eos_token_id],
            [self.chat, self.control_tokens, dict(self.chat_template_kwargs)],
            ids,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _continues(prompt: str, responses: Sequence[str]) -> bool:
    """Whether responses go on with a text: a turn of the assistant's written out, or a sentence left open."""
    if is_transcript(prompt):
        return True
    words = [text for text in responses if text]
    spaced = all(text[:1] == " " and text[1:2].strip() for text in words)
    return bool(words) and spaced and not prompt[-1:].isspace() and prompt[-1:] not in (".", "!", "?")


def _agreement(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginnings."""
    if second[: len(first)] == first:
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
