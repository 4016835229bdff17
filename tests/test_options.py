"""Laws of the options: flags, config file, Python and help agree with one declaration; nothing is guessed."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from minispeed.__main__ import COMMANDS, options_class
from minispeed.errors import UserError
from minispeed.options import (
    Options,
    command_of,
    from_json,
    help_text,
    option,
    options_of,
    page,
    parse,
    to_json,
)
from minispeed.options.foreign import FOREIGN


@dataclass(frozen=True, kw_only=True)
class SftOptions(Options):
    """Fine-tune a model.

    minispeed sft talks.jsonl --epochs 2
    """

    data: tuple[Path, ...] = option(help="files", positional=True)
    epochs: int = option(3, help="passes over the files", low=1, high=1000)
    lr: float = option(1e-3, help="learning rate", group="Learning")
    dtype: str = option("auto", help="of products", choices=("auto", "bf16", "fp32"))
    max_new: int | None = option(None, help="longest answer", unit="tokens")
    name: str | None = option(None, help="what to call it")
    pack: bool = option(True, help="share rows")
    colour: bool | None = option(None, help="with colours")
    out: Path = option(Path("runs"), help="where to", metavar="DIR")
    weights: list[float] = option([1.0, 2.0], help="how often each file is drawn", low=0)
    words: list[str] = option([], help="words to look for")
    flags: tuple[bool, ...] = option((), help="switches, several")


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Show a file.

    minispeed show talks.jsonl
    """

    data: Path = option(help="a file", positional=True)
    count: int = option(3, help="how many", positional=True)


texts = st.text(max_size=8)
paths = st.text(min_size=1, max_size=8).filter(lambda text: "\0" not in text).map(Path)
numbers = st.floats(allow_nan=False, allow_infinity=False)
drawn_options = st.builds(
    SftOptions,
    data=st.lists(paths, max_size=3),
    epochs=st.integers(1, 1000),
    lr=numbers,
    dtype=st.sampled_from(["auto", "bf16", "fp32"]),
    max_new=st.none() | st.integers(),
    name=st.none() | texts,
    pack=st.booleans(),
    colour=st.none() | st.booleans(),
    out=paths,
    weights=st.lists(numbers.map(abs), max_size=3),
    words=st.lists(texts, max_size=3),
    flags=st.lists(st.booleans(), max_size=3),
)


def words_of(options: Options) -> list[str]:
    """Type options as a command line: what is the default too."""
    words = []
    for name, value in to_json(options).items():
        flag = "--" + name.replace("_", "-")
        if value is None or value == []:
            words += [] if name == "data" else [f"--no-{flag[2:]}"] if name != "colour" else []
        elif name in ("pack", "colour"):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def refused(call, *arguments, **keywords) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    return caught.value


@given(drawn_options)
def test_options_survive_json(options):
    assert from_json(SftOptions, json.loads(json.dumps(to_json(options)))) == options


@given(drawn_options)
def test_options_survive_the_command_line(options):
    if not options.data:
        options = SftOptions(**{**vars(options), "data": [Path("x")]})
    assert parse(words_of(options), SftOptions) == options


@given(st.lists(st.sampled_from(["--lr", "2", "-x", "-", "--", "--pack", "--no-lr", "--epochs=7", "a b", ""])))
def test_any_words_give_options_or_a_sentence(words):
    try:
        assert isinstance(parse(words, SftOptions), SftOptions)
    except UserError as error:
        assert error.what and error.fix


@given(st.sampled_from([one.name for one in fields(SftOptions)]), st.integers(1, 9), st.integers(1, 9))
def test_a_flag_wins_over_the_config_file_that_over_the_default(tmp_path_factory, name, in_file, on_line):
    path = tmp_path_factory.mktemp("config") / "run.json"
    path.write_text(json.dumps({"sft": {"max-new": in_file, "data": ["x"]}, "show": {}, "provenance": {"a": 1}}))
    assert parse(["--config", str(path)], SftOptions, commands=["show"]).max_new == in_file
    assert parse(["--config", str(path), f"--max_new={on_line}"], SftOptions, commands=["show"]).max_new == on_line
    assert getattr(parse(["x"], SftOptions), name) == getattr(SftOptions(data=("x",)), name)


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (
            ["x", "--epochs", "a"],
            "--epochs must be a whole number, at least 1, at most 1000; got 'a'",
            "--epochs 3",
        ),
        (
            ["x", "--epochs", "0"],
            "--epochs must be a whole number, at least 1, at most 1000; got 0",
            "--epochs 3",
        ),
        (["x", "--lr", "nan"], "--lr must be a number; got nan", "--lr 0.001"),
        (["x", "--lr", "inf"], "--lr must be a number; got inf", "--lr 0.001"),
        (["x", "--dtype", "fp23"], "--dtype must be one of auto, bf16, fp32; got 'fp23'", "--dtype fp32"),
        (["x", "--weights", "-1"], "--weights must be a number, at least 0; got -1.0", "--weights X"),
        (["x", "--epoch", "3"], "sft has no option --epoch", "--epochs N  # passes over the files"),
        (["x", "-epochs", "3"], "sft has no option -epochs", "--epochs N  # passes over the files"),
        (["x", "--zzzzz"], "sft has no option --zzzzz", "minispeed sft --help"),
        (["x", "--no-epochs"], "sft has no option --no-epochs", "--epochs N  # passes over the files"),
        (
            ["x", "--num_train_epochs", "3"],
            "--num_train_epochs is --epochs here",
            "--epochs N  # passes over",
        ),
        (["x", "--learning-rate=3"], "--learning-rate is --lr here", "--lr X  # learning rate"),
        (["x", "--bf16"], "--bf16 is --dtype here", "--dtype bf16  # of products"),
        (["x", "--lr"], "--lr takes a value, but nothing follows it", "--lr=X"),
        (["x", "--lr", "--pack"], "--lr takes a value, but --pack follows it", "--lr=X"),
        (["x", "--pack=1"], "--pack takes no value, got '1'", "--pack or --no-pack, without a value"),
        (["x", "--lr=1", "--lr=2"], "--lr is given 2 times: 1.0, 2.0", "giving it once"),
        (["x", "--no-words", "--words=a"], "--words is given 2 times: (), a", "giving it once"),
        ([], "sft needs DATA: files", "minispeed sft DATA"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words, what, fix):
    error = refused(parse, words, SftOptions)
    assert error.what == what
    assert error.fix.startswith(fix)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"sft": {"epochs": "3"}}', '"epochs" (in the block "sft" of FILE) must be a whole number'),
        ('{"sft": {"epochs": true}}', '"epochs" (in the block "sft" of FILE) must be a whole number'),
        ('{"sft": {"lr": 1e999}}', '"lr" (in the block "sft" of FILE) must be a number; got inf'),
        (
            '{"sft": {"lr": ' + "9" * 400 + "}}",
            '"lr" (in the block "sft" of FILE) must be a number; got 99999',
        ),
        ('{"sft": {"weights": 1}}', '"weights" (in the block "sft" of FILE) must be a list; got 1'),
        ('{"sft": {"learning_rate": 1}}', '"learning_rate" (in the block "sft" of FILE) is "lr" here'),
        ('{"sft": {"max_new": 1, "max-new": 2}}', '"max-new" (in the block "sft" of FILE) is there twice'),
        ('{"sft": {"lr": 1, "lr": 2}}', 'the config file FILE is not JSON: the key "lr" is there twice'),
        ('{"stf": {}}', '"stf" in the config file FILE is no command'),
        ('{"show": {}}', 'the config file FILE has no block "sft"'),
        ("[]", "the config file FILE holds no object but list"),
        ('{"sft": {},}', "the config file FILE is not JSON: "),
    ],
)
def test_a_mistake_in_the_config_file_is_named(tmp_path, text, what):
    path = tmp_path / "run.json"
    path.write_text(text)
    error = refused(parse, ["x", "--config", str(path)], SftOptions, commands=["show"])
    assert error.what.startswith(what.replace("FILE", str(path)))
    assert error.fix


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    assert refused(parse, ["--config", str(tmp_path / "no")], SftOptions).what.endswith("No such file or directory")


def test_a_mistake_from_python_is_named():
    error = refused(SftOptions, data=("x",), epochs=2.5)
    assert error.what == "SftOptions.epochs must be a whole number, at least 1, at most 1000; got 2.5"
    assert error.fix == "epochs=3"


def test_positional_words_go_to_their_places():
    assert parse(["a", "--lr", "1", "b"], SftOptions).data == (Path("a"), Path("b"))
    assert parse(["--", "--a"], SftOptions).data == (Path("--a"),)
    assert parse(["a", "7"], ShowOptions) == ShowOptions(data=Path("a"), count=7)
    assert refused(parse, ["a", "7", "b"], ShowOptions).what == "show has no place for 'b'"
    assert refused(parse, ["a", "b"], ShowOptions).what == "COUNT must be a whole number; got 'b'"


def test_help_shows_the_example_and_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["x", "--help"], SftOptions)
    shown = capsys.readouterr().out
    assert not caught.value.code
    assert "\n    minispeed sft talks.jsonl --epochs 2\n" in shown
    assert "usage: minispeed sft [options] DATA...\n" in shown
    assert "usage: minispeed show [options] DATA [COUNT]\n" in help_text(ShowOptions)
    for line in (
        "--epochs N  ",
        "--out DIR  ",
        "--pack, --no-pack  ",
        "DATA...  ",
        "Learning:",
        "--config FILE  ",
    ):
        assert line in shown
    assert " ".join(shown.split()).count("default: ") == len(options_of(SftOptions)) - 1  # data is required
    assert "longest answer (in tokens; default: not set)" in " ".join(shown.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command):
    cls = options_class(command)
    assert command_of(cls) == command
    examples = [line.split() for line in (cls.__doc__ or "").splitlines() if line.strip().startswith("minispeed ")]
    assert examples
    for _, name, *words in examples:
        assert name == command
        options = parse(words, cls)
        assert from_json(cls, to_json(options)) == options


def test_every_foreign_name_is_answered_once_with_an_option_that_exists():
    known = {name for command in COMMANDS for name in options_of(options_class(command))}
    theirs = [name for names in FOREIGN.values() for name in names.split()]
    assert {ours.split()[0] for ours in FOREIGN} <= known
    assert len(theirs) == len(set(theirs))
    assert not known & set(theirs)


def test_the_page_of_options_is_fresh():
    written = Path(__file__).parent.parent / "docs" / "options.md"
    made = page({command: options_class(command) for command in COMMANDS})
    assert written.read_text(encoding="utf-8") == made, "docs/options.md is not what the code says: run `make options`"
