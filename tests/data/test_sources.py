"""Splits are never mixed, files are read as they are now, and whatever cannot be read is a counted, located bad row."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from mopo_kernels.data import DataError, PreferenceData, load_preferences, summarize
from mopo_kernels.data.loaders import detect_format

PAIR: dict[str, Any] = {"i": 0, "j": 1, "preference": {"k": 1.0}}


def row(prompt: Any = "p", **changes: Any) -> dict[str, Any]:
    return {"prompt": prompt, "responses": ["a", "b"], "pairs": [PAIR]} | changes


def lines(*rows: object) -> str:
    return "".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in rows)


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text(lines(*rows), encoding="utf-8")
    return path


def prompts(data: PreferenceData) -> list[Any]:
    return [example.prompt for example in data]


class TestSplits:
    @pytest.mark.parametrize(
        "layout",
        ["data/{}-00000-of-00001.parquet", "{}.parquet", "{}/0000.parquet", "{}.jsonl", "default/{}/part-0.jsonl"],
    )
    def test_those_of_ultrafeedback_binarized_are_apart(self, tmp_path: Path, layout: str) -> None:
        names = ["train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen"]
        for name in names:
            write(tmp_path / layout.format(name), row(name))
        with pytest.raises(DataError, match=f"has several splits \\({', '.join(sorted(names))}\\): pass split="):
            load_preferences(tmp_path)
        for name in names:
            assert prompts(load_preferences(tmp_path, split=name)) == [name]
        with pytest.raises(DataError, match="several splits are 'train', there are: test_gen"):
            load_preferences(tmp_path, split="train")

    @pytest.mark.parametrize(
        ("files", "split", "expected"),
        [
            (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
            (["train.jsonl", "dev.jsonl"], "dev", ["dev.jsonl"]),
            (["train_prefs.jsonl", "test.jsonl"], "train", ["train_prefs.jsonl"]),
            (["train-0-of-2.jsonl", "train-1-of-2.jsonl"], None, ["train-0-of-2.jsonl", "train-1-of-2.jsonl"]),
            (["a/train.jsonl", "b/train.jsonl", "a/test.jsonl"], "train", ["a/train.jsonl", "b/train.jsonl"]),
            (["part1.jsonl", "part2.jsonl"], "train", ["part1.jsonl", "part2.jsonl"]),
            (["train.jsonl", "dataset_infos.json"], None, ["train.jsonl"]),
        ],
    )  # fmt: skip
    def test_files_belong_to_splits_by_their_names(
        self, tmp_path: Path, files: list[str], split: str | None, expected: list[str]
    ) -> None:
        for name in files:
            write(tmp_path / name, row(name))
        assert prompts(load_preferences(tmp_path, split=split)) == expected

    def test_files_of_several_names_that_are_read_together_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path / "one.jsonl", row("1"))
        write(tmp_path / "two.jsonl", row("2"))
        assert prompts(load_preferences(tmp_path)) == ["1", "2"]
        assert caplog.messages == [f"{tmp_path}: 2 files are read as one split: one.jsonl, two.jsonl"]
        caplog.clear()
        write(tmp_path / "shards" / "train-0.jsonl", row("1"))
        write(tmp_path / "shards" / "train-1.jsonl", row("2"))
        assert len(load_preferences(tmp_path / "shards")) == 2
        assert not caplog.messages

    def test_files_of_forms_that_are_not_read_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path / "train-0.jsonl", row())
        for name in ("train-1.csv", "train-2.JSONL", "train-3.jsonl.zst", "notes.txt", ".hidden.csv"):
            (tmp_path / name).write_bytes(b"")
        assert len(load_preferences(tmp_path)) == 1
        (told,) = caplog.messages
        assert told.endswith(": train-1.csv, train-2.JSONL, train-3.jsonl.zst")

    @pytest.mark.parametrize("other", ["train.parquet", "train.jsonl.gz", "train.ndjson"])
    def test_one_file_in_two_forms_is_refused(self, tmp_path: Path, other: str) -> None:
        write(tmp_path / "train.jsonl", row())
        (tmp_path / other).write_bytes(b"")
        with pytest.raises(DataError, match=f"expected every row once; got one file in several forms: .*{other}"):
            load_preferences(tmp_path)

    def test_patterns_of_a_card_that_overlap_read_a_file_once(self, tmp_path: Path) -> None:
        write(tmp_path / "a1.jsonl", row())
        text = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [a*, a1*]\n---\n"
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert len(load_preferences(tmp_path)) == 1

    def test_a_data_set_card_says_what_they_are(self, tmp_path: Path) -> None:
        for name in ("good", "better", "best"):
            write(tmp_path / "rows" / f"{name}.jsonl", row(name))
        card = {
            "train": "rows/b*.jsonl",
            "held_out": ["rows/good.jsonl"],
        }
        entries = "".join(f"  - split: {split}\n    path: {json.dumps(path)}\n" for split, path in card.items())
        text = f"---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n# Rows\n"
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert prompts(load_preferences(tmp_path, split="held_out")) == ["good"]
        assert prompts(load_preferences(tmp_path, split="train")) == ["best", "better"]
        with pytest.raises(DataError, match=r"has several splits \(held_out, train\): pass split="):
            load_preferences(tmp_path)

    @pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/secret.jsonl", "none/*.jsonl", "README.md"])
    def test_a_card_cannot_name_files_elsewhere(self, tmp_path: Path, pattern: str) -> None:
        write(tmp_path / "secret.jsonl", row("secret"))
        write(tmp_path / "set" / "train.jsonl", row())
        text = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(pattern)}\n---\n"
        (tmp_path / "set" / "README.md").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"README\.md: "):
            load_preferences(tmp_path / "set")

    @pytest.mark.parametrize(
        "text", ["# Rows\n", "---\nlicense: mit\n---\n", "---\nbroken", "---\nconfigs: 3\n---\n", ""]
    )
    def test_a_card_that_says_nothing_of_them_is_passed_over(self, tmp_path: Path, text: str) -> None:
        write(tmp_path / "train.jsonl", row())
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert len(load_preferences(tmp_path)) == 1

    def test_a_saved_data_set_has_its_own(self, tmp_path: Path) -> None:
        parts = {name: datasets.Dataset.from_list([row(name)], split=name) for name in ("train", "test")}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
        parts["test"].save_to_disk(str(tmp_path / "one"))
        assert prompts(load_preferences(tmp_path / "all", split="test")) == ["test"]
        assert prompts(load_preferences(tmp_path / "one", split="test")) == ["test"]
        with pytest.raises(DataError, match=r"has several splits \(test, train\)"):
            load_preferences(tmp_path / "all")
        with pytest.raises(DataError, match="no split 'train', there is: test"):
            load_preferences(tmp_path / "one", split="train")

    def test_a_split_of_what_has_none_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.jsonl", row())
        for source in (path, [row()], pandas.DataFrame([row()]), datasets.Dataset.from_list([row()])):
            with pytest.raises(DataError, match="no split 'test', there is: one without a name"):
                load_preferences(source, split="test")
            assert len(load_preferences(source, split="train")) == 1
        assert len(load_preferences(write(tmp_path / "test.jsonl", row()), split="test")) == 1

    @pytest.mark.parametrize("option", ["name", "data_dir", "revision"])
    def test_an_option_that_a_file_cannot_take_is_refused(self, tmp_path: Path, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option}: expected None for a file; got 'x'"):
            load_preferences(write(tmp_path / "rows.jsonl", row()), **{option: "x"})


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_replaced_another_is_read_anew(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.{suffix}", row("old"))
    before = path.stat()
    assert prompts(load_preferences(path)) == ["old"]
    write(path, row("new"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prompts(load_preferences(path)) == ["new"]


def trl(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "a", "rejected": "b"} | changes


def rated(*completions: Any) -> dict[str, Any]:
    return {"instruction": "p", "completions": list(completions)}


def completion(response: Any, rating: Any = "3", **changes: Any) -> dict[str, Any]:
    return {"response": response, "annotations": {"helpfulness": {"Rating": rating}}} | changes


DEEP = "[" * 100_000 + "]" * 100_000
TWICE = json.dumps(row()).replace('{"k": 1.0}', '{"k": 1.0, "k": 0.0}')
HUGE = json.dumps(row(weight=12321)).replace("12321", "1" * 5000)


class TestBadRows:
    @pytest.mark.parametrize(
        ("line", "field", "problem"),
        [
            (TWICE, "k", "is given twice in one object"),
            (HUGE, None, "an integer of 5000 digits"),
            (json.dumps(row(x=1)).replace("1}", DEEP + "}"), None, "nested too deeply"),
            (json.dumps(row("\ud800")), "prompt", "half of a surrogate pair at character 0"),
            (json.dumps(row(id="\ud800")), "id", "half of a surrogate pair"),
            (json.dumps(row(pairs=[PAIR | {"preference": {"\ud800": 1}}])), "pairs[0].preference", "surrogate"),
            (json.dumps(row(system="\udfff")), "system", "half of a surrogate pair"),
            (json.dumps(row(tools=[{"name": "\ud800"}])), "tools", "half of a surrogate pair"),
            (json.dumps(row(weight=1e39)), "weight", "a positive number, of a size up to 1e+10; got 1e+39"),
            (json.dumps(row(weight=1e-46)), "weight", "a positive number, at least 1e-10; got 1e-46"),
            (json.dumps(row(ref_logprob=[-1e39, 0.0])), "ref_logprob[0]", "of a size up to 1e+10"),
            (json.dumps(row(pairs=[PAIR | {"margin": 1e39}])), "pairs[0].margin", "of a size up to 1e+10; got 1e+39"),
            ("{}", "prompt", "expected a string; got None"),
            ("[]", None, "expected an object; got list"),
            ("null", None, "expected an object; got NoneType"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["lines", "array"])
    def test_each_is_located_and_can_be_skipped(
        self, tmp_path: Path, place: str, line: str, field: str | None, problem: str
    ) -> None:
        rows = [json.dumps(row("1")), line, json.dumps(row("2"))]
        path = tmp_path / "rows.json"
        path.write_text(f"[{','.join(rows)}]" if place == "array" else lines(*rows), encoding="utf-8")
        with pytest.raises(DataError) as caught:
            load_preferences(path)
        assert (caught.value.source, caught.value.line, caught.value.field) == (str(path), 2, field)
        assert problem in caught.value.problem
        data = load_preferences(path, on_error="skip")
        # Where a value of an array has no end, the next one has no beginning.
        assert prompts(data) == (["1"] if place == "array" and line.endswith(DEEP + "}") else ["1", "2"])
        assert [str(error) for error in data.skipped] == [str(caught.value)]
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("first", ["{}", "[]", '{"text": "a"}', "7", "", "{broken", TWICE])
    def test_a_first_row_without_use_does_not_decide_for_the_others(self, tmp_path: Path, first: str) -> None:
        path = write(tmp_path / "rows.jsonl", first, trl())
        assert detect_format(path) == "trl"
        data = load_preferences(path, on_error="skip")
        assert (len(data), len(data.skipped)) == (1, int(bool(first)))
        if first:
            with pytest.raises(DataError) as caught:
                load_preferences(path)
            assert caught.value.line == 1

    @pytest.mark.parametrize("text", ["[{}]", "\n\n[{}\n]\n", "[\n{},\n{}\n]"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
    def test_arrays_are_told_from_lines(self, tmp_path: Path, text: str, mark: bytes) -> None:
        path = tmp_path / "rows.json"
        path.write_bytes(mark + text.replace("{}", json.dumps(row())).encode())
        assert len(load_preferences(path)) == text.count("{}")

    @pytest.mark.parametrize("text", ["[]", "[{}", "[{} {}]", "[{},]", "[{}] []", "[{},\n{broken]"])
    def test_an_array_that_breaks_off_keeps_what_came_before(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "rows.json"
        path.write_text(text.replace("{}", json.dumps(row())), encoding="utf-8")
        if text == "[]":
            with pytest.raises(DataError, match="no usable row"):
                load_preferences(path)
            return
        data = load_preferences(path, on_error="skip")
        assert (len(data), len(data.skipped)) == (1, 1)
        assert data.skipped[0].line == 2

    @pytest.mark.parametrize("harm", ["torn", "flipped", "no-gzip"])
    def test_a_corrupt_gzip_is_a_bad_row_of_its_own(self, tmp_path: Path, harm: str) -> None:
        content = bytearray(gzip.compress(lines(*(row(str(index)) for index in range(2000))).encode()))
        if harm == "torn":
            del content[-200:]
        elif harm == "flipped":
            content[len(content) // 2] ^= 0xFF
        else:
            content = bytearray(b"plain text")
        write(tmp_path / "set" / "b.jsonl", row("whole"))
        (tmp_path / "set" / "a.jsonl.gz").write_bytes(content)
        data = load_preferences(tmp_path / "set", on_error="skip")
        assert prompts(data)[-1] == "whole"
        assert "cannot be read" in data.skipped[-1].problem
        assert data.skipped[-1].source == str(tmp_path / "set" / "a.jsonl.gz")
        with pytest.raises(DataError):
            load_preferences(tmp_path / "set")

    @pytest.mark.parametrize("harm", [lambda content: content[:-40], lambda content: b"PAR1" + content[4:][::-1]])
    def test_so_is_a_corrupt_parquet_file(self, tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
        write(tmp_path / "set" / "b.jsonl", row("whole"))
        broken = write(tmp_path / "set" / "a.parquet", row("1"))
        broken.write_bytes(harm(broken.read_bytes()))
        data = load_preferences(tmp_path / "set", on_error="skip")
        assert (prompts(data), [error.source for error in data.skipped]) == (["whole"], [str(broken)])

    def test_values_of_python_that_cannot_be_shown_are_refused_like_others(self) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        bad = [row(weight=10**5000), row(prompt=deep), row(tools=deep), trl(chosen=deep), row(x=deep) | {"pairs": deep}]
        data = load_preferences([*bad, row()], on_error="skip", format="canonical")
        assert (len(data), [error.line for error in data.skipped]) == (1, [1, 2, 3, 4, 5])
        assert all(len(str(error)) < 300 for error in data.skipped)
        # freed from the inside, which Python would do in as deep a recursion
        while deep:
            deep = deep.pop()

    def test_every_row_of_a_group_that_is_refused_is_counted(self) -> None:
        rows = [{"prompt": "too long", "response": text, "helpfulness": rating} for rating, text in enumerate("abc")]
        good = [{"prompt": "p", "response": text, "helpfulness": rating} for rating, text in enumerate("ab")]
        data = load_preferences(rows + good, max_prompt_chars=3, on_error="skip")
        assert prompts(data) == ["p"]
        assert [(error.line, error.field) for error in data.skipped] == [(1, "prompt"), (2, "prompt"), (3, "prompt")]

    @pytest.mark.parametrize(
        ("bad", "field", "problem"),
        [
            (completion(""), "response", "is empty"),
            (completion("much too long"), "response", "more than the limit of 10"),
            (completion("c", True), "annotations.helpfulness.Rating", 'a rating from 1 to 5 or "N/A"; got True'),
            (completion("c", "6"), "annotations.helpfulness.Rating", "got '6'"),
            (completion("c", 10**5000), "annotations.helpfulness.Rating", "got a int that is too large to show"),
            (completion("c", annotations=["helpfulness"]), "annotations", "expected an object of aspect -> rating"),
            (completion("c", annotations={"helpfulness": 3}), "annotations.helpfulness", "object with Rating; got 3"),
            (completion("c", annotations=""), "annotations", "expected an object of aspect -> rating"),
            ("c", None, "expected an object with response and annotations"),
        ],
    )  # fmt: skip
    def test_a_bad_completion_leaves_the_others_of_its_row(self, bad: Any, field: str | None, problem: str) -> None:
        here = "completions[1]" + (f".{field}" if field else "")
        source = [rated(completion("a", "1"), bad, completion("b", "5"))]
        data = load_preferences(source, on_error="skip", max_response_chars=10)
        (example,) = data
        assert example.responses == ("a", "b")
        assert [(error.line, error.field) for error in data.skipped] == [(1, here)]
        assert problem in data.skipped[0].problem
        with pytest.raises(DataError, match=r"rows:1: completions\[1\]"):
            load_preferences(source, max_response_chars=10)

    @pytest.mark.parametrize(
        "source",
        [
            [{"prompt": "p", "response": "a", "helpfulness": True}, {"prompt": "p", "response": "b", "helpfulness": 1}],
            [{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": True}],
        ],
        ids=["helpsteer", "pku-saferlhf"],
    )
    def test_true_is_no_rating(self, source: Sequence[Any]) -> None:
        with pytest.raises(DataError, match="got True"):
            load_preferences(source)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    frame = pandas.DataFrame([["p", "a", "b", "q"]], columns=["prompt", "chosen", "rejected", "prompt"])
    with pytest.raises(ValueError, match="expected columns of different names; got prompt, chosen, rejected, prompt"):
        load_preferences(frame)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["p"], ["a"], ["b"], ["q"]], names=list(frame)), path)
    with pytest.raises(DataError, match="cannot be read: expected columns of different names; got prompt"):
        load_preferences(path)


class TestEmptyResponses:
    CHAT: tuple[dict[str, Any], ...] = (
        {"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": ""},
        {"prompt": "p", "system": "s", "chosen": "a", "rejected": ""},
        {"prompt": [{"role": "user", "content": "p"}]}
        | {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", ""))},
        {"prompt": "p", "chosen": "a", "rejected": ""},
        {name: f"USER: p\nASSISTANT:{text}" for name, text in (("chosen", " a"), ("rejected", ""))},
    )

    @pytest.mark.parametrize("source", CHAT, ids=["messages", "system", "all-messages", "text", "implicit"])
    def test_a_rejected_turn_may_be_empty_and_a_chosen_one_not(self, tmp_path: Path, source: dict[str, Any]) -> None:
        data = load_preferences([source])
        assert data[0].responses[1] == ""
        data.save(tmp_path / "rows.parquet")
        assert list(load_preferences(tmp_path / "rows.parquet")) == list(data)
        with pytest.raises(DataError, match="rows:1: chosen: is empty"):
            load_preferences([source | {"chosen": source["rejected"], "rejected": source["chosen"]}])

    def test_a_transcript_may_end_with_one_where_it_becomes_turns(self) -> None:
        row = {name: f"\n\nHuman: p\n\nAssistant:{text}" for name, text in (("chosen", " a"), ("rejected", " "))}
        assert load_preferences([row], objective="k")[0].responses == ("a", "")
        with pytest.raises(DataError, match="rows:1: rejected: the last assistant turn is empty"):
            load_preferences([row], objective="k", conversational=False)

    def test_a_report_counts_them(self) -> None:
        found = summarize(load_preferences([trl(rejected="")]))
        assert found.empty_responses == 1
        assert any(message.startswith("1 responses are empty") for message in found.messages)

    @pytest.mark.parametrize("blank", [" ", "\n", None])
    def test_white_space_is_no_answer(self, blank: Any) -> None:
        data = load_preferences([trl(rejected=blank), trl()], on_error="skip")
        assert [(error.line, error.field) for error in data.skipped] == [(1, "rejected")]
