"""Properties of rows written by chat templates, over texts and conversations that nobody thought of."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from chat_samples import TEMPLATES, chat_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from mopo_kernels.data import DataError, PreferenceCollator, PreferenceData, PreferenceExample, PreferencePair
from mopo_kernels.data.rendering import Renderer
from mopo_kernels.data.tokenized import tokenize_data

NAMES = sorted(TEMPLATES)
CONTROL = sorted({token for each in TEMPLATES.values() for token in (*each.special, each.end, each.eos, "<pad>")})

# Words, white space and symbols, any text that UTF-8 has, and pieces of what templates write.
words = st.one_of(
    st.sampled_from(
        [" ", "\n", "\n\n", "yes", " no", "[INST]", "assistant", "Human:", "<", "|", ">", "</think>", "é", "日"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=6),
)


def joined(pieces: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Texts of a few pieces that are not blank."""
    return st.tuples(st.lists(pieces, max_size=4), st.sampled_from(["a", "no", "日", "?"])).map(
        lambda parts: "".join(parts[0]) + parts[1]
    )


harmless = joined(words)
controls = st.sampled_from(CONTROL)
texts = st.one_of(
    harmless, controls, st.tuples(joined(st.one_of(words, controls)), st.one_of(st.just(""), controls)).map("".join)
)


@cache
def renderer(name: str, chat: str = "auto") -> Renderer:
    return Renderer(chat_tokenizer(name), chat)


def example(prompt: Any, responses: list[str]) -> PreferenceExample:
    return PreferenceExample(prompt, tuple(responses), (PreferencePair(0, 1, {"a": 1.0}),))


@st.composite
def conversations(draw: st.DrawFn, words: st.SearchStrategy[str] = texts) -> list[dict[str, str]]:
    count = draw(st.integers(0, 2))
    roles = ["user", *(role for _ in range(count) for role in ("assistant", "user"))]
    return [{"role": role, "content": draw(words)} for role in roles]


def special_ids(name: str) -> set[int]:
    tokenizer = renderer(name).tokenizer
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@given(st.sampled_from(NAMES), conversations(), st.lists(texts, min_size=2, max_size=3))
def test_a_conversation_has_its_own_turns_and_one_end_whatever_its_texts_say(
    name: str, prompt: list[dict[str, str]], responses: list[str]
) -> None:
    own, special = renderer(name), special_ids(name)
    item = own.tokenize([example(prompt, responses)])[0]
    plain = own.tokenize([example([{**turn, "content": "yes"} for turn in prompt], ["no", "yes"])])[0]
    controls = [token for token in item.prompt if token in special]
    assert controls == [token for token in plain.prompt if token in special]
    for ids in item.responses:
        assert ids[-1] == own.end_ids[0]
        assert [token for token in ids if token in special] == [
            token for token in plain.responses[0] if token in special
        ]
    assert item.prompt == own.prompt_ids(prompt)[: len(item.prompt)]


@given(st.sampled_from(NAMES), conversations(harmless), st.lists(harmless, min_size=2, max_size=3))
def test_prompt_and_response_are_the_tokens_of_the_whole_text(
    name: str, prompt: list[dict[str, str]], responses: list[str]
) -> None:
    own = renderer(name)
    tokenizer = own.tokenizer
    item = own.tokenize([example(prompt, responses)])[0]
    for response, ids in zip(responses, item.responses, strict=True):
        messages = [*prompt, {"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert whole[: len(item.prompt) + len(ids)] == item.prompt + ids


@given(st.sampled_from(NAMES), texts, st.lists(texts, min_size=2, max_size=3))
def test_text_stands_as_it_is_and_ends_once(name: str, prompt: str, responses: list[str]) -> None:
    own = renderer(name, "never")
    assume(not own._is_rendered(prompt, responses))
    item = own.tokenize([example(prompt, responses)])[0]
    for response, ids in zip(responses, item.responses, strict=True):
        assert ids[-1] in own.end_ids
        if response.rstrip().endswith(own.tokenizer.eos_token):
            assert ids[-2:-1] != ids[-1:]
        written = own.render(example(prompt, [response, response])).wholes[0]
        assert written.startswith(prompt)


@given(
    st.sampled_from(NAMES), st.lists(st.tuples(texts, st.lists(texts, min_size=2, max_size=3)), min_size=1, max_size=4)
)
def test_a_table_of_a_data_set_has_the_rows_or_the_reasons_of_single_examples(
    name: str, rows: list[tuple[str, list[str]]]
) -> None:
    examples = [example(prompt, responses) for prompt, responses in rows]
    strict = Renderer(chat_tokenizer(name), control_tokens="refuse")
    table = tokenize_data(strict, PreferenceData.from_examples(examples))
    for item, row in zip(examples, table, strict=True):
        if row["problem"] is None:
            expected = strict.tokenize([item])[0]
            assert (row["prompt"], row["responses"]) == (expected.prompt, expected.responses)
        else:
            with pytest.raises(DataError) as caught:
                strict.tokenize([item])
            assert (row["problem"], row["field"]) == (caught.value.problem, caught.value.field)


@given(st.sampled_from(NAMES), texts, st.lists(harmless, min_size=2, max_size=3), st.integers(1, 40))
def test_limits_refuse_or_cut_and_never_more(name: str, prompt: str, responses: list[str], limit: int) -> None:
    item = example(prompt, responses)
    tokenizer = renderer(name).tokenizer
    whole = PreferenceCollator(tokenizer, ["a"]).tokenize([item])[0]
    cut = PreferenceCollator(tokenizer, ["a"], max_response_length=limit, truncate=True)
    assert cut.tokenize([item])[0].responses == [ids[:limit] for ids in whole.responses]
    refusing = PreferenceCollator(tokenizer, ["a"], max_response_length=limit)
    if max(map(len, whole.responses)) <= limit:
        assert refusing.tokenize([item])[0] == whole
    else:
        with pytest.raises(DataError, match="tokens, more than the"):
            refusing.tokenize([item])
