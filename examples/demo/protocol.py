"""The demo's protocol: what is trained, judged and claimed, settled before the first result on the test prompts.

    python examples/demo/protocol.py            # writes the digests of prompts and data into protocol.json

`protocol.json` holds the objectives and their thresholds, the settings of training and of the judging, the claims in
words, and digests of the three splits of the prompts and of the data files. `run.py` does nothing under a protocol
whose digests are not those of the files beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prompts import split_digest, test_prompts, train_prompts, validation_prompts

HERE = Path(__file__).parent
FILE = HERE / "protocol.json"
PREFERENCES = HERE / "data" / "preferences.jsonl"
BASE = HERE / "data" / "base.jsonl"


@dataclass(frozen=True)
class Protocol:
    """Everything that decides the outcome, but for the seed.

    Attributes:
        primary: the objective that is maximised.
        thresholds: least win rate over the base model, by held objective, as claimed on the test prompts.
        aims: what training asks for in their place: a policy that sits exactly on a threshold would miss it in half of
            all samples, and one that keeps it with a bound has to be that much above.
        training: options of ``MOPOConfig``, for both policies.
        control: further ones for the constrained policy, of what moves its multipliers.
        lora: options of peft's ``LoraConfig``.
        samples: answers per test prompt and policy.
        validation_samples: the same per validation prompt, while the scale of the rival is looked for.
        scales: of the rival, the unconstrained adapter turned down, ascending.
        max_new_tokens, batch_size: of sampling.
        confidence: of the one-sided bounds, and of the two-sided intervals.
        claims: what is checked on the test prompts, in words, by name.
        digests: SHA-256, in hex, of the splits of the prompts and of the data files, by name.
    """

    primary: str
    thresholds: dict[str, float]
    aims: dict[str, float]
    training: dict[str, Any]
    control: dict[str, Any]
    lora: dict[str, Any]
    samples: int
    validation_samples: int
    scales: list[float]
    max_new_tokens: int
    batch_size: int
    confidence: float
    claims: dict[str, str]
    digests: dict[str, str]

    def fingerprint(self) -> str:
        """Tells protocols apart: SHA-256 of their content, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def found_digests() -> dict[str, str]:
    """The digests of the prompts and data files as they are."""
    splits = {"train": train_prompts(), "validation": validation_prompts(), "test": test_prompts()}
    files = {file.name: file.read_bytes() if file.is_file() else b"" for file in (PREFERENCES, BASE)}
    return {
        **{f"{name} prompts": split_digest(prompts) for name, prompts in splits.items()},
        **{name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }


def load_protocol(file: Path = FILE) -> Protocol:
    """The protocol, its digests not looked at.

    Raises:
        ValueError: the file lacks a field or has one too many.
    """
    try:
        return Protocol(**json.loads(file.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{file}: not a protocol: {error}") from error


def check_digests(protocol: Protocol) -> None:
    """Raises ValueError, naming them, where prompts or data are not those of the protocol."""
    found = found_digests()
    other = [name for name in found.keys() | protocol.digests.keys() if found.get(name) != protocol.digests.get(name)]
    if other:
        raise ValueError(
            f"{FILE.name} is of other data: the digest of {', '.join(sorted(other))} differs from what it records. "
            "Nothing is run; a new protocol is a new experiment (python examples/demo/protocol.py writes its digests)"
        )


def main() -> None:
    """Write the digests into the protocol."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    content["digests"] = found_digests()
    FILE.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {digest}" for name, digest in content["digests"].items()))


if __name__ == "__main__":
    main()
