"""The `lmc` command: what is done with trained networks, and what needs no training.

A command is a function of the wing it belongs to; its arguments are the options, its docstring the
help. Here they are listed, and only the one that is asked for is imported.
"""

import argparse
import difflib
import inspect
import itertools
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Union, get_args, get_origin, get_type_hints

from lmc.errors import needs, one_line
from lmc.typos import check_names, named_options

# By name: where it is, and what it does. A command may be several, by the next word.
COMMANDS: dict[str, tuple[str, str]] = {
    "triplets": ("lmc.shards.store.triplets", "sample the triplets of stage one into shards"),
    "closed_form": (
        "lmc.closed_form.closed_form",
        "estimate a closed-form corrector, in seconds, in place of stage one",
    ),
    "stability": (
        "lmc.measure.stability.stability_command",
        "whether LMC-SDS with a corrector holds or runs away, without a training",
    ),
    "evaluate": (
        "lmc.measure.commands.evaluate",
        "measure translators and folders of images on held-out images",
    ),
    "report": ("lmc.measure.commands.report", "one HTML page of what was measured"),
    "release": ("lmc.release.release", "turn a run folder into a release"),
    "export": ("lmc.export.export", "write a release as ONNX, for programs without Python"),
    "page": ("lmc.page.page", "write a web page that runs a translator in the browser"),
    "translate": ("lmc.translate.translate", "translate image files"),
    "compare": (
        "lmc.compare.comparison.compare",
        "train the translator with several losses and measure each",
    ),
    "synthesize": (
        "lmc.one_image.synthesis.synthesize",
        "optimise an image from grey towards a prompt",
    ),
    "edit": ("lmc.one_image.synthesis.edit", "optimise a photo towards a prompt"),
    "edits": (
        "lmc.one_image.edits.edits",
        "a list of edits under many losses and guidance scales, measured",
    ),
    "gradients": (
        "lmc.one_image.gradients.gradients",
        "picture the gradients of one image at some t",
    ),
    "dreamsampler edit": ("lmc.one_image.dreamsampling.Edit", "edit a photo by DreamSampler"),
    "dreamsampler inpaint": ("lmc.one_image.dreamsampling.Inpaint", "fill in what a mask marks"),
    "dreamsampler super_resolve": (
        "lmc.one_image.dreamsampling.SuperResolve",
        "enlarge a small image",
    ),
    "dreamsampler deblur": ("lmc.one_image.dreamsampling.Deblur", "sharpen a blurred image"),
    "dreamsampler restore_svg": (
        "lmc.one_image.dreamsampling.RestoreSVG",
        "find the vector graphic of a blurred or small image",
    ),
}

# What extra is enough for a command: these, and 'train' for all others but `translate`.
EXTRA = {"evaluate": "evaluate", "report": "evaluate", "export": "onnx", "page": "onnx"}

# Of trainings: what a configuration that a command takes is one of.
STAGES = {
    "compare": ("lmc.training.translator", "TranslatorTraining"),
    "triplets": ("lmc.training.bias", "CorrectorTraining"),
    "closed_form": ("lmc.training.bias", "CorrectorTraining"),
    "stability": ("lmc.training.bias", "CorrectorTraining"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what the user has to mend ends it with one line, Ctrl-C with 130."""
    with one_line("lmc"):
        run(sys.argv[1:] if args is None else list(args))


def run(args: Sequence[str]) -> None:
    """Run a command.

    Raises:
        ValueError: there is no such command, or an argument is missing, unknown or of a wrong
            type; or see the command.
    """
    name = next((n for n in (" ".join(args[:2]), *args[:1]) if n in COMMANDS), None)
    if name is None:
        several = [each for each in COMMANDS if args and each.startswith(f"{args[0]} ")]
        asked = args[len(several) > 0 :][:1]
        if asked and asked[0] not in ("-h", "--help"):
            raise ValueError(unknown(asked[0], "command", [n.split()[-1] for n in several]))
        print(overview(several or list(COMMANDS)))
        sys.exit(0 if asked else 2)
    words = args[len(name.split()) :]
    check_options(name, words)
    with needs(f"lmc {name}", EXTRA.get(name, "train")):
        _run(name, words)


def _run(name: str, words: Sequence[str]) -> None:
    """Run a command, with the words behind its name."""
    if name in STAGES:
        files = itertools.takewhile(lambda word: not word.startswith("-"), words)
        check_names(*STAGES[name], ["fit", *(f"--config={file}" for file in files)])
    command = load(name)
    parser = parser_of(name, command)
    if _positional(command) == "training" and words[:1] and words[0].startswith("--config"):
        raise ValueError(f"the training's configuration goes without --config: lmc {name} FILE …")
    try:
        given = parser.parse_args(joined(words, types_of(command)))
    except argparse.ArgumentError as error:
        raise ValueError(said(name, str(error))) from error
    from lmc.configs import instantiate

    given.pop("config", None)
    record = parser.dump(given, skip_none=False)
    built = vars(instantiate(parser, given))
    if inspect.isclass(command):
        task: Any = command(**built)
        task(record)
    else:
        kept = {"record": record} if "record" in inspect.signature(command).parameters else {}
        command(**built, **kept)


def said(name: str, error: str) -> str:
    """What the parser says of a command line, as a line; more of a class or its option unknown."""
    text = " ".join(error.split())
    found = re.fullmatch(r'Parser key "([\w.]+)": Expected a dot import path string: (\S+)', text)
    if found:
        option, word = found.groups()
        return f"there is no {option} {word}: lmc {name} --help lists them; or give an import path"
    found = re.match(r"""Parser key "([\w.]+)": .*'(\w+)' is not accepted""", text)
    path = re.search(r"""class_path[ =]'([\w.]+)'""", text)
    if found and path:
        option, word = found.groups()
        of = path[1].rpartition(".")[2]
        return f"{of} has no --{option}.{word}: lmc {name} --{option}.help {of} lists what it has"
    return text


def check_options(name: str, words: Sequence[str]) -> None:
    """Name a misspelt option at once, before seconds of imports; the parser knows the rest.

    Raises:
        ValueError: the command has no such option.
    """
    module, _, attribute = COMMANDS[name][0].rpartition(".")
    known = [each for each in named_options(module, attribute) or [] if each != "record"]
    given = itertools.takewhile(lambda word: word != "--", words)
    for option in (word.partition("=")[0] for word in given if word.startswith("--")):
        top = option.partition(".")[0].removesuffix("+")
        if known and top[2:] not in (*known, "help", "config", "print_config"):
            raise ValueError(unknown(option, "option", [f"--{each}" for each in known]))


def overview(names: Sequence[str]) -> str:
    """The commands, a line each."""
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "usage: lmc COMMAND [--config FILE] [--OPTION VALUE ...]\n",
            *lines,
            "\nlmc COMMAND --help has the options of each; --print_config writes them as YAML.",
        ]
    )


def load(name: str) -> Any:
    """The function, or class, of a command."""
    module, _, attribute = COMMANDS[name][0].rpartition(".")
    return getattr(import_module(module), attribute)


def parser_of(name: str, command: Any) -> Any:
    """The parser of a command's options: its arguments, but for `record`, which is no option."""
    import jsonargparse

    inputs = f" {_positional(command).upper()}" if _positional(command) else ""
    parser: Any = jsonargparse.ArgumentParser(
        prog=f"lmc {name}",
        # In place of all options there are, which would push an error out of sight.
        usage=f"%(prog)s{inputs} [--config FILE] [--OPTION VALUE ...]",
        description=(inspect.getdoc(command) or "").split("\n\nArgs:")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML with any of the options below")
    add = parser.add_class_arguments if inspect.isclass(command) else parser.add_function_arguments
    add(command, skip={"record"} & {*inspect.signature(command).parameters}, as_positional=True)
    return parser


def types_of(command: Any) -> dict[str, Any]:
    """The options of a command with their types; None for that of the positional arguments."""
    hints = get_type_hints(command.__init__ if inspect.isclass(command) else command)
    types = {f"--{name}": hints.get(name) for name in inspect.signature(command).parameters}
    return {**types, "": hints.get(_positional(command))}


def _positional(command: Any) -> str:
    """The argument that precedes the options: the one that is not by keyword alone; '' if none."""
    parameters = inspect.signature(command).parameters.values()
    return next((p.name for p in parameters if p.kind is not p.KEYWORD_ONLY), "")


def joined(args: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Arguments as jsonargparse takes them: several values of a list as one, a flag with `true`.

    `--to lion bear` becomes `--to=["lion", "bear"]`, `--offline` `--offline=true`. What stands
    before the options, or behind one that takes no more, goes to the argument without a name.

    Args:
        args: as typed.
        types: of the options by name, of the argument without a name by ''.
    """
    found: list[str] = []
    free: list[str] = []
    for option, values in _grouped(args):
        kind = types.get(option)
        if option == "--":  # what follows is for another command line
            found += [f"--overrides={json.dumps(values)}"] if "--overrides" in types else values
        elif not option:
            free += values
        elif _is_list(kind) and values and not (len(values) == 1 and _is_whole(values[0], kind)):
            found.append(f"{option}={json.dumps(values, ensure_ascii=False)}")
        elif kind is bool and values[:1] not in (["true"], ["false"]):
            found.append(f"{option}=true")
            free += values
        else:
            found += [option, *values[:1]]
            free += values[1:]
    if free and _is_list(types[""]):
        free = [json.dumps(free, ensure_ascii=False)]
    return [*free, *found]


def _grouped(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Options with the values behind them; first those before any, under ''."""
    option, values = "", list[str]()
    for number, arg in enumerate(args):
        if not arg.startswith("--") and arg != "-h":
            values.append(arg)
            continue
        yield option, values
        if arg == "--":
            yield arg, list(args[number + 1 :])
            return
        option, equals, value = arg.partition("=")
        values = [value] if equals else []
    yield option, values


def _is_list(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_list(each) for each in get_args(kind))
    return kind is list or get_origin(kind) is list


def _is_whole(value: str, kind: Any) -> bool:
    """Whether a value is the list itself, or something else that the option takes as it is."""
    return value[:1] in "[{" or (get_origin(kind) is not list and str in get_args(kind))


def unknown(word: str, what: str, known: Sequence[str]) -> str:
    """An unknown word, and the one that may be meant."""
    known = known or list(COMMANDS)
    near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), known, 1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"unknown {what} {word}; {meant}"
