"""Misspelt options of a training, named in a moment: before torch and Lightning are imported.

What options there are is read from the sources, of which none is imported. Where they cannot tell
(a user's own class, say) nothing is said of it: the parser, which comes later, knows all.
"""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parent
PARSER = ("config", "help", "print_config", "seed_everything")  # LightningCLI's own
OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
ROOTS = ("ABC", "object", "Protocol", "Generic")  # bases without arguments


@dataclass(frozen=True)
class Found:
    """A class in the sources: its module's name and its definition."""

    module: str
    node: ast.ClassDef

    @property
    def is_dataclass(self) -> bool:
        """Whether its fields are its arguments."""
        return any("dataclass" in ast.unparse(each) for each in self.node.decorator_list)

    @property
    def is_protocol(self) -> bool:
        """Whether others are of its kind without naming it as a base."""
        return any("Protocol" in ast.unparse(base) for base in self.node.bases)


@dataclass(frozen=True)
class Slot:
    """What may stand under an option.

    Attributes:
        group: the class whose arguments are the options below it.
        kind: the class whose subclasses are named below it by class_path and init_args.
    """

    group: Found | None = None
    kind: Found | None = None


def check_names(module: str, name: str, args: Sequence[str]) -> None:
    """Refuse the first option or key of a command line of `fit` that there is not.

    Args:
        module, name: of the training's class.
        args: the command line, `fit` first.

    Raises:
        FileNotFoundError: there is no such config file.
        ValueError: an unknown key or option, with the nearest known one and the file; an unknown
            class; or a file that is no YAML of options, with the line.
    """
    if "fit" not in args:
        return
    names = _Names(_top_level(module, name))
    for option, value in _tokens(args[args.index("fit") + 1 :]):
        if option in ("config", "c"):
            if value is not None and value != "-" and "://" not in value:
                names.look(value, _read(value))
            continue
        if option.split(".")[-1] in ("help", "h", "print_config"):
            continue
        given = _yaml_or_text(value)
        for key in reversed(option.split(".")):
            given = {key: given}
        names.look(f"--{option}", given)


class _Names:
    """Looks at what is given of the options, one source after the other."""

    def __init__(self, top: Mapping[str, Slot]) -> None:
        self.top = top
        self.classes: dict[str, Found | None] = {}  # by option, as given so far

    def look(self, where: str, given: Mapping[str, Any]) -> None:
        """Refuse what is unknown in `given`; `where` it stands is a file or an option."""
        self._options(where, "", given, self.top)

    def _options(
        self,
        where: str,
        path: str,
        given: Mapping[str, Any],
        known: Mapping[str, Slot],
        of: str = "",
    ) -> None:
        for key, value in given.items():
            name, _, rest = str(key).removesuffix("+").partition(".")
            if name not in known:
                raise ValueError(f"{where}: {self._unknown(path, name, known, of)}")
            inside = f"{path}.{name}" if path else name
            self._inside(where, inside, {rest: value} if rest else value, known[name])

    def _inside(self, where: str, path: str, value: Any, slot: Slot) -> None:
        if slot.group is not None and isinstance(value, dict) and "class_path" not in value:
            known = options(slot.group)
            if known is not None:
                self._options(where, path, value, known)
        elif slot.kind is not None and isinstance(value, str):
            self.classes[path] = _resolve(where, path, value, slot.kind)
        elif slot.kind is not None and isinstance(value, dict):
            if isinstance(value.get("class_path"), str):
                self.classes[path] = _resolve(where, path, value["class_path"], slot.kind)
            of = self.classes.get(path)
            known = options(of) if of is not None else None
            if of is None or known is None:
                return
            # Options may stand right under the class's, without init_args between.
            free = {key: each for key, each in value.items() if key not in OF_A_CLASS}
            init_args = value.get("init_args")
            for inner in (free, init_args if isinstance(init_args, dict) else {}):
                self._options(where, path, inner, {**known}, of.node.name)

    def _unknown(self, path: str, name: str, known: Iterable[str], of: str) -> str:
        """What to say of an option that is not `known`."""
        owner = " ".join(filter(None, [path, f"({of})" if of else ""])) or "the training"
        more = OF_A_CLASS if of else ()
        near = difflib.get_close_matches(name, [*known, *more], 1)
        if not near:
            groups = {group: options(slot.group) for group, slot in self.top.items() if slot.group}
            near = [f"{group}.{name}" for group, names in groups.items() if name in (names or {})]
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        return f"{owner} has no {name!r}; {hint}"


# ---------------------------------------------------------------------------------------------
# What is given


def _tokens(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options, without their dashes, and their values."""
    rest = list(args)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return
        if token[:1] != "-" or _is_number(token):
            continue  # a value that the parser has to make sense of
        option, equals, value = token.partition("=")
        if equals:
            yield option.lstrip("-"), value
        else:
            follows = rest and (rest[0][:1] != "-" or _is_number(rest[0]))
            yield option.lstrip("-"), rest.pop(0) if follows else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read(file: str) -> Mapping[str, Any]:
    """The content of a config file; or of the text itself, which the parser takes as well."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no YAML: it is no text") from error
    except OSError as error:
        inline = _yaml_or_text(file)
        if isinstance(inline, dict):
            return inline
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"--config: no such file: {file}") from error
        raise OSError(f"--config: {file}: {error.strerror}") from error
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, each, None) for each in ("problem_mark", "problem"))
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}{line}: no YAML: {problem or error}") from error
    if not isinstance(content, dict):
        kind = {list: "a list", type(None): "nothing"}.get(type(content), repr(content)[:40])
        raise ValueError(f"{file} holds {kind}, not options by name, such as 'run: runs/mine'")
    return content


def _yaml_or_text(value: str | None) -> Any:
    try:
        return yaml.safe_load(value) if value is not None else None
    except yaml.YAMLError:
        return value


# ---------------------------------------------------------------------------------------------
# What there is, from the sources


def _top_level(module: str, name: str) -> dict[str, Slot]:
    """The options of `fit`: those of LightningCLI, of `TrainingCLI` and of the groups."""
    trainer = find("lightning.pytorch.trainer.trainer", "Trainer")
    cli = find("lmc.training.cli", "TrainingCLI")
    if trainer is None or cli is None:
        raise ValueError("lightning or lmc is not installed whole")
    known = {*PARSER, *_arguments(_method(trainer, "fit"))}
    for node in ast.walk(_method(cli, "subcommands")):
        if isinstance(node, ast.Return) and node.value is not None:
            known -= ast.literal_eval(node.value)["fit"]
    groups = {
        "model": find(module, name),
        "data": find("lmc.training.data", "ImageData"),
        "trainer": trainer,
    }
    for node in ast.walk(_method(cli, "add_arguments_to_parser")):
        if isinstance(node, ast.Constant) and str(node.value).startswith("--"):
            known.add(str(node.value).removeprefix("--"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_class_arguments":
            kind, group = (ast.unparse(each) for each in node.args[:2])
            groups[ast.literal_eval(group)] = find(cli.module, kind)
    return {each: Slot() for each in sorted(known)} | {k: Slot(v) for k, v in groups.items()}


@cache
def _source(module: str) -> ast.Module | None:
    """The source of a module of this package or of Lightning, if there is one."""
    top, *rest = module.split(".")
    if top == "lmc":
        folder = PACKAGE
    elif top == "lightning" and (spec := importlib.util.find_spec(top)):
        folder = Path((spec.submodule_search_locations or [""])[0])
    else:
        return None
    path = folder.joinpath(*rest)
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


@cache
def find(module: str, name: str) -> Found | None:
    """The class that a module defines or imports under a name."""
    tree = _source(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Found(module, node)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return find(node.module, alias.name)
    return None


def named_options(module: str, name: str) -> list[str] | None:
    """The options of a command: a dataclass's fields, a function's arguments by keyword alone.

    None where its source cannot tell.
    """
    if (found := find(module, name)) is not None:
        known = options(found)
        return None if known is None else list(known)
    tree = _source(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [each.arg for each in node.args.kwonlyargs]
    return None


@cache
def options(of: Found) -> dict[str, Slot] | None:
    """The arguments of a class's constructor by name; None where its source cannot tell."""
    init = _method(of, "__init__")
    if init is None and of.is_dataclass:
        fields = [each for each in of.node.body if isinstance(each, ast.AnnAssign)]
        own = {ast.unparse(each.target): _slot(of.module, each.annotation) for each in fields}
        inherited = _inherited(of)
        return None if inherited is None else {**inherited, **own}
    if init is None:
        return None if of.node.decorator_list else _inherited(of)
    own = {name: _slot(of.module, each) for name, each in _arguments(init).items()}
    if init.args.kwarg is None:
        return own
    name, passed, used = init.args.kwarg.arg, 0, 0
    for node in ast.walk(init):
        used += isinstance(node, ast.Name) and node.id == name
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            passed += sum(each.arg is None for each in node.keywords)
    inherited = _inherited(of) if used == passed else None
    return None if inherited is None else {**inherited, **own}


def _inherited(of: Found) -> dict[str, Slot] | None:
    """The arguments of the first base that has any; None where that is not known here."""
    for base in of.node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        if name in ROOTS:
            continue
        found = find(of.module, name)
        return options(found) if found else None
    return {}


def _method(of: Found, name: str) -> Any:
    """A method's definition, if the class itself has it."""
    methods = (each for each in of.node.body if isinstance(each, ast.FunctionDef))
    return next((each for each in methods if each.name == name), None)


def _arguments(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """A method's arguments and their annotations, but self."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return {each.arg: each.annotation for each in every if each.arg != "self"}


def _slot(module: str, annotation: ast.expr | None) -> Slot:
    """What may stand under an argument: known where it is of one class, or None."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    parts = ast.unparse(annotation).split(" | ") if annotation is not None else []
    others = [part for part in parts if part != "None"]
    found = find(module, others[0]) if len(others) == 1 else None
    is_group = found is None or found.is_dataclass
    return Slot(group=found) if is_group else Slot(kind=found)


def _resolve(where: str, path: str, text: str, kind: Found) -> Found | None:
    """The class that `text` names, if it is one of this package.

    Raises:
        ValueError: there can be none of that name.
    """
    if "/" in text or Path(text).is_file():  # a file with the class and its options
        return None
    at = where if where.startswith(f"--{path}") else f"{where}: {path}"
    module, _, name = text.rpartition(".")
    if not module:
        known = {each.node.name: each for each in _near(kind) if _is_a(each, kind)}
        # Another's classes can be named shortly if they are imported, with their base, already.
        if text in known or kind.is_protocol or kind.module in sys.modules:
            return known.get(text)
        raise ValueError(f"{at}: unknown class {text!r}; {_hint(text, known, 'known are')}")
    top = module.partition(".")[0]
    if top != "lmc":
        if top.isidentifier() and top not in sys.modules and importlib.util.find_spec(top) is None:
            raise ValueError(f"{at} {text}: there is no module {top!r} to import")
        return None
    tree = _source(module)
    if tree is None:
        raise ValueError(f"{at} {text}: there is no module {module!r}")
    found = find(module, name)
    said = {each for node in tree.body for each in _defined(node)}
    if found is not None or name in said:
        return found
    if "__getattr__" in said:
        return next((each for each in _near(kind) if each.node.name == name), None)
    raise ValueError(f"{at}: {module} has no {name!r}; {_hint(name, said, 'it has')}")


def _hint(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{otherwise} {', '.join(known)}, or give a class by its import path"


def _near(kind: Found) -> Iterator[Found]:
    """The classes beside `kind`: of its module, or of all modules of its wing."""
    parts = kind.module.split(".")
    beside = PACKAGE.joinpath(*parts[1:-1]).glob("*.py") if len(parts) > 2 else ()
    names = [".".join([*parts[:-1], file.stem]) for file in sorted(beside)] or [kind.module]
    for module in names:
        tree = _source(module)
        for node in tree.body if tree else ():
            if isinstance(node, ast.ClassDef):
                yield Found(module, node)


def _is_a(each: Found, kind: Found) -> bool:
    """Whether a class is below `kind`; all are below a protocol."""
    if kind.is_protocol:
        return True
    names = [ast.unparse(base) for base in each.node.bases]
    bases = [find(each.module, name) for name in names]
    return any(base == kind or (base is not None and _is_a(base, kind)) for base in bases)


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (ast.unparse(target) for target in targets)
