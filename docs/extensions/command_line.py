"""A directive that writes down the options of a `mopo` command, from the command itself.

    ```{mopo-command} eval
    ```

Every option becomes an ``option`` of the program, with its default, so that pages can refer to it.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Option(NamedTuple):
    """An option as it is written (``--output FILE``), what it does, and its default, if it has one worth showing."""

    names: str
    help: str
    default: str | None


def _literal(text: str) -> str:
    """Plain text as Markdown, every mark of it escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~^])", r"\\\1", " ".join(text.split()))


def _shown(default: object) -> str | None:
    return None if default in (None, False, "", [], (), {}) or callable(default) else str(default)


def _typer_options(command: Any) -> Iterator[Option]:
    """Arguments and options of a command of typer's."""
    for parameter in command.params:
        text = f"{parameter.help or ''} {'Required.' if parameter.required else ''}"
        metavar = parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "argument":
            names = metavar
        else:
            is_flag = isinstance(parameter.default, bool) or parameter.secondary_opts
            value = "" if is_flag else f" {metavar}"
            names = ", ".join(f"{name}{value}" for name in (*parameter.opts, *parameter.secondary_opts))
        yield Option(names, text, None if parameter.required else _shown(parameter.default))


def _described(owner: type) -> dict[str, str]:
    """Argument -> what the ``Args`` of a class's docstring say of it."""
    _, _, after = (inspect.getdoc(owner) or "").partition("Args:\n")
    items = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", after, re.MULTILINE)
    return {name: text.replace("``", "`") for name, text in items}


def _train_groups() -> Iterator[tuple[str, list[Option]]]:
    """The options of ``mopo train`` that this library adds to those of transformers, by dataclass."""
    from transformers import TrainingArguments

    from mopo_kernels.cli.train import DataArguments, ModelArguments, make_parser
    from mopo_kernels.trainer import MOPOConfig

    actions = {action.dest: action for action in make_parser()._actions}
    inherited = {field.name for field in fields(TrainingArguments)}
    yield "The configuration file", [Option("--config FILE.yaml", actions["config"].help or "", None)]
    for title, owner in (("Model", ModelArguments), ("Data", DataArguments), ("Training", MOPOConfig)):
        described = _described(owner)
        found = []
        for field in fields(owner):
            if owner is MOPOConfig and field.name in inherited:
                continue
            text = _literal(actions[field.name].help or "") or described[field.name]
            found.append(Option(f"--{field.name} {field.name.upper()}", text, _field_default(field)))
        yield title, found


def _field_default(field: Field[Any]) -> str | None:
    return None if field.default is MISSING else _shown(field.default)


def _argparse_options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        metavar = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        yield Option(f"{', '.join(action.option_strings)}{metavar}", action.help or "", None)


def _text(options: list[Option], escaped: bool = False) -> list[str]:
    """Markdown of a list of options."""
    lines = []
    for option in options:
        text = option.help if escaped else _literal(option.help)
        default = f" Default: `{option.default}`." if option.default is not None else ""
        lines += [f"````{{option}} {option.names}", f"{text}{default}", "````", ""]
    return lines


def _command_text(name: str) -> list[str]:
    """Markdown of a command's description and options."""
    lines = [f"```{{program}} mopo {name}", "```", ""]
    if name == "train":
        for title, options in _train_groups():
            lines += [f"**{title}**", "", *_text(options, escaped=True)]
        return lines
    if name == "bench":
        from bench.run import make_parser

        return lines + _text(list(_argparse_options(make_parser())))
    command = _find(name)
    help_text = inspect.cleandoc(command.help or "")
    return [*lines, *map(_literal, help_text.split("\n\n")), "", *_text(list(_typer_options(command)))]


def _find(name: str) -> Any:
    from mopo_kernels.cli.app import app
    from mopo_kernels.cli.data import data_app

    first, *rest = name.split()
    group: Any = typer.main.get_command(data_app if first == "data" else app)
    return group.commands[rest[0] if rest else first]


class Command(SphinxDirective):
    """``{mopo-command} NAME``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(_command_text(self.arguments[0])))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("mopo-command", Command)
    return {"parallel_read_safe": True}
