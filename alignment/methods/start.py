"""From a command line to a method's training run; and the commands ``alignment run`` and ``alignment methods``."""

from __future__ import annotations

from alignment import methods, runtime
from alignment.arguments import Arguments, parse
from alignment.arguments.foreign import RL_ALGORITHMS
from alignment.arguments.parser import find
from alignment.arguments.presets import in_words
from alignment.arguments.resolve import beside_file
from alignment.arguments.sources import ENDINGS, Given, read_argv, read_file
from alignment.arguments.spec import read_list
from alignment.cli import RUNNERS, TASKS
from alignment.errors import ArgumentsError, nearest

RUN_USAGE = "usage: alignment run NAME [FILE] [key=value ...]     NAME: see `alignment methods`; or file.py:Class"
LIST_USAGE = "usage: alignment methods [FILE] [plugins=...]"


def run_method(method: type, argv: list[str], preset: str | None = None) -> int:
    """Run a method with ``[FILE] [key=value ...]`` and return its exit status: 0, or 130 after an interruption.

    Args:
        method: see :mod:`alignment.methods`.
        argv: the words behind the command's and the method's name.
        preset: the preset that the command named in the method's place.

    Raises:
        AlignmentError: whatever the user can mend.
        SystemExit: with status 0, after ``--help`` has been answered.
    """
    _, given = _load_plugins(argv)  # before the arguments are read: names that they register are values of keys
    other = next((item.value for item in given if item.key == "preset" and item.is_text and item.value != preset), None)
    if preset and other:
        raise ArgumentsError(
            f"command line: preset {other}, but the command is `{preset}`, a preset too: name one of them"
        )
    cls = methods.arguments_of(method)
    chosen = [f"preset={preset}"] if preset else []
    if {"-h", "--help"}.intersection(argv):  # answered before Paddle is loaded
        parse(cls, argv)
    from alignment.flow.runner import run_stage

    return run_stage(argv, lambda words: parse(cls, [*words, *chosen]), method.run)


def main(argv: list[str]) -> int:
    """``alignment NAME ...``: run the method, or the preset, of that name.

    Raises:
        ArgumentsError: there is no task, method or preset of that name; the message lists tasks and methods.
        AlignmentError: whatever else the user can mend.
    """
    name, rest = argv[0], argv[1:]
    if name in methods.BUILT_IN:
        return run_method(methods.find_method(name), rest)
    found = methods.with_preset(name)
    if found is None:
        known = list(dict.fromkeys([*TASKS, *methods.BUILT_IN]))
        close = nearest(name, [*known, *methods.preset_names()])
        raise ArgumentsError(
            f"unknown task {name!r}{close}\nThe tasks are: {', '.join(known)}. A method of your own is "
            "started with `alignment run NAME FILE`."
        )
    return run_method(found, rest, name)


def run_command(argv: list[str]) -> int:
    """``alignment run NAME [FILE] [key=value ...]``: run any registered method or preset, plug-ins' too.

    Raises:
        AlignmentError: there is no such method, or whatever else the user can mend.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(RUN_USAGE)
        return 0
    name, rest = argv[0], argv[1:]
    if name.endswith(ENDINGS) or "=" in name:
        raise ArgumentsError(f"{name!r} is no method's name\n{RUN_USAGE}")
    file, _ = _load_plugins(rest)
    known = {*methods.known_methods(), *methods.ALIASES}
    with_preset = None if name in known else methods.with_preset(name)
    if with_preset is not None:
        return run_method(with_preset, rest, name)
    return run_method(methods.find_method(beside_file(name, file)), rest)


def list_command(argv: list[str]) -> int:
    """``alignment methods [FILE] [plugins=...]``: one line for each method, and for each of its presets.

    Raises:
        ArgumentsError: a plug-in cannot be loaded.
    """
    if {"-h", "--help"}.intersection(argv):
        print(LIST_USAGE)
        return 0
    _load_plugins(argv)
    known = methods.known_methods()
    rows = [(name, TASKS[name].summary) for name in RUNNERS if methods.ALIASES.get(name, name) not in known]
    for name, method in known.items():
        command = name if name in methods.BUILT_IN else f"run {name}"
        rows.append((command, f"{method.title}: {method.summary}"))
        for preset, settings in getattr(method, "presets", {}).items():
            if preset != name:
                rows.append((f"  {preset}", f"{name} with {in_words(settings)}"))
    width = max((len(command) for command, _ in rows), default=0)
    print("\n".join(f"  {command:<{width}}  {text}" for command, text in rows))
    return 0


def chosen_method(argv: list[str]) -> type | None:
    """The method that paddlenlp's ``rl_algorithm`` chooses for ``alignment ppo``; None for PPO itself, or without it.

    Raises:
        ArgumentsError: the file cannot be read, or the method is not there.
    """
    given = [item.value for item in _given(argv)[1] if item.key == "rl_algorithm" and item.value is not None]
    name = RL_ALGORITHMS.get(given[-1], "ppo") if given and isinstance(given[-1], str) else "ppo"
    return None if name == "ppo" else methods.find_method(name)


def _load_plugins(argv: list[str]) -> tuple[str | None, list[Given]]:
    """Import the plug-ins that a file or the command line names, and installed ones."""
    from alignment.plugins import load_plugins

    file, given = _given(argv)
    named: list[str] = []
    for item in given:
        if item.key == "plugins" and item.value is not None:
            try:
                named = read_list(item.value, item.is_text)
            except ValueError as error:
                raise ArgumentsError(f"{item.where}: plugins: {error}") from None
        elif item.key == "device" and item.value == "cpu":
            runtime.stay_on_cpu()  # a plug-in may load Paddle
    with runtime.quiet_import():
        load_plugins([beside_file(name, file) for name in named])
    return file, given


def _given(argv: list[str]) -> tuple[str | None, list[Given]]:
    """What a command line and its file give, whatever method it is for."""
    words = [word for word in argv if word not in ("-h", "--help")]

    def kind(key: str) -> str | None:
        spec = find(Arguments, key)
        return None if spec is None else spec.kind

    file, overrides = read_argv(words, kind)
    return file, [*(read_file(file) if file else []), *overrides]
