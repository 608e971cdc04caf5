"""The command line as a user meets it: help, exit codes, one paragraph for every mistake, and the whole way once."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import filled_cache, find_file, flip_byte, write_set
from PIL import Image

import featprobe
from featprobe.cache import MISSING, WHOLE, Cache, read_contents
from featprobe.cli.main import cli
from featprobe.image_labels import ImageLabels, Unit
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.probes import load_head

ROOT = Path(__file__).parents[2]
NETWORK = ("--backbone", "tf_efficientnet_lite0", "--random-init")


def call(workspace: Path, *arguments: object, **more: Any) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(
        cli, ["--workspace", str(workspace), *map(str, arguments)], prog_name="featprobe", **more
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def child(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m featprobe` in a process of its own, or some code with these arguments."""
    how = ["-c", code] if code else ["-m", "featprobe"]
    environment = {k: v for k, v in os.environ.items() if k != "FEATPROBE_WORKSPACE"}
    command = [sys.executable, *how, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def refusal(workspace: Path, *arguments: object, code: int = 1) -> str:
    """What a command says that can't be done: on stderr, one paragraph, of ours; nothing on stdout."""
    result = call(workspace, *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    text = result.stderr.rpartition("\r")[2].strip()
    assert "\n\n" not in text or code == 2
    if code == 1:
        assert text.startswith("featprobe: "), text
    return text


def commands(group: click.Group = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command and subcommand with its words."""
    for name, command in group.commands.items():
        words = f"{path} {name}".strip()
        yield words, command
        if isinstance(command, click.Group):
            yield from commands(command, words)


WORDS = [words for words, _ in commands()]


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_commands_are_the_documented_ones() -> None:
    wanted = """
        try init extract plan probe finetune study compare inspect predict export data cache probes backbones demo
        config doctor
    """.split()
    assert sorted(cli.commands) == sorted(wanted)


@pytest.mark.parametrize("words", WORDS)
def test_every_commands_help_has_an_example_that_names_it(words: str) -> None:
    example = help_of(words).partition("Example:")[2].partition("\n\n")[0]
    assert re.search(rf"featprobe (--workspace \S+ )?{words}\b", example), example


def help_of(words: str) -> str:
    """What a person reads in a terminal of 80 columns."""
    result = CliRunner().invoke(cli, [*words.split(), "--help"], prog_name="featprobe", terminal_width=80)
    assert result.exit_code == 0
    return result.stdout


def test_options_state_the_default_of_each_kind_of_head() -> None:
    checked = set()
    for option in cli.commands["probe"].params:
        stated = re.search(r"\[default: (.*)\]", getattr(option, "help", None) or "")
        if stated and hasattr(TrainRecipe, str(option.name)):
            said = {name: value for value, names in re.findall(r"([^ ,]+) \(([\w, ]+)\)", stated[1])
                    for name in names.split(", ")}  # fmt: skip
            for kind in KINDS.values():
                dense = option.name in ("loss", "loss_at", "class_weights")
                if kind.live and (kind.task == "semseg" or not dense):
                    value = str(getattr(kind.recipe, str(option.name)))
                    alone = sum(name == kind.name for _, name in KINDS) == 1
                    named = kind.name if alone else f"{kind.name} of {kind.task}"
                    assert value == said.get(named, stated[1]), (option.name, kind)
                    checked.add((option.name, named))
    assert len({name for name, _ in checked}) == 8 and len(checked) >= 30


def test_options_offer_all_units_and_places_of_labels() -> None:
    """The command line names them itself: to import them takes numpy, and `--help` must be quick."""
    offered = {option.name: getattr(option.type, "choices", ()) for option in cli.commands["probe"].params}
    assert tuple(offered["labels"]) == get_args(ImageLabels) and tuple(offered["unit"]) == get_args(Unit)


@pytest.mark.parametrize("words", ["", *WORDS])
def test_help_fits_80_columns_and_cuts_nothing(words: str) -> None:
    text = help_of(words)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\w\.\.\.$", text.partition("Commands:")[2], re.MULTILINE), text


@pytest.mark.parametrize("words", WORDS)
def test_help_of_an_option_is_a_sentence_with_its_default_at_the_end(words: str) -> None:
    for param in dict(commands())[words].params:
        if isinstance(param, click.Option) and not param.hidden:
            text, bracket, default = (param.help or "").partition("  [default: ")
            assert re.fullmatch(r"[A-Z`a-z][^\[]*\.", text), (param.name, text)
            assert default.endswith("]") or not bracket
            assert "Default:" not in text


@pytest.mark.parametrize(
    ("words", "headings"),
    [
        ("extract", ["Backbone", "Data set", "Features", "Tiles and views", "Computing", "Output"]),
        ("probe", ["What to train", "Head", "Training", "Computing", "Output"]),
        ("finetune", ["What to train", "Backbone and images", "Head", "Training", "Computing", "Output"]),
    ],
)
def test_options_of_long_commands_stand_under_headings(words: str, headings: list[str]) -> None:
    text = help_of(words)
    assert re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE) == [*headings, "Other options"]
    named = {name for param in cli.commands[words].params if isinstance(param, click.Option) and not param.hidden
             for name in param.opts}  # fmt: skip
    assert named <= set(re.findall(r"--[\w-]+", text))


def test_own_weights_of_a_training_are_named_in_the_configuration(tmp_path: Path) -> None:
    for words in ("probe", "finetune"):
        said = refusal(tmp_path, words, "--extract", "--backbone", "resnet18", "--weights", "my.pth", code=2)
        assert "[backbones.NAME]" in said and 'weights = "my.pth"' in said
        assert f"featprobe {words} --extract --backbone NAME" in said
        assert "--weights " not in help_of(words)


def test_help_version_and_usage_errors_answer_without_torch() -> None:
    code = (
        "import sys\nfrom featprobe.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('HEAVY', sorted({'torch', 'timm', 'h5py', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    for arguments, exit_code, said in (
        (["--help"], 0, "Which pretrained backbone"),
        (["--version"], 0, featprobe.__version__),
        (["extract", "--help"], 0, "--backbone"),
        (["extract", "--data", "xray"], 2, "Missing option '--backbone'"),
        (["probe", "--iterations", "0"], 2, "--iterations"),
    ):
        result = child(*arguments, code=code)
        assert result.returncode == exit_code, result.stderr
        assert said in result.stdout + result.stderr
        assert result.stdout.rstrip().endswith("HEAVY []")


def test_looking_after_data_and_caches_needs_neither_torch_nor_timm(images: Path, tmp_path: Path) -> None:
    cache = filled_cache(tmp_path / "cache" / "parts-000000" / "some-00000000.h5")
    lines = [
        ["data"],
        ["data", "info", images],
        ["data", "show", images, "--out", tmp_path / "sheet.png"],
        ["data", "check", images, "--quiet"],
        ["data", "split", images, "--out", tmp_path / "split.csv", "--split", "stratified"],
        ["data", "convert", images, "--out", tmp_path / "coco", "--quiet"],
        ["data", "make", "surface", "--out", tmp_path / "made", "--images", 12, "--size", "32x32"],
        ["cache", "ls"],
        ["cache", "info", cache.path, "--json"],
        ["cache", "verify", "--quiet"],
        ["cache", "rm", cache.path, "--yes"],
        ["probes", "ls"],
        ["config"],
        ["init", images, "--quiet"],
    ]
    code = (
        "import contextlib, json, sys\nfrom featprobe.cli.main import cli\n"
        "for words in json.loads(sys.argv[2]):\n"
        "    with contextlib.redirect_stdout(sys.stderr):\n"
        "        cli(['--workspace', sys.argv[1], *words], standalone_mode=False)\n"
        "    print(words[:2], sorted({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    result = child(tmp_path, json.dumps([list(map(str, words)) for words in lines]), code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{list(map(str, words))[:2]} []" for words in lines]


# ---- terminals and pipes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_fit_the_terminal_and_are_whole_in_a_pipe(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "parts", 6, (32, 32))
    name = "a_defect_with_a_long_name_as_some_have"
    (folder / "classes.txt").write_text(f"background\n{name}\n")
    piped = child("data", "check", folder, "--quiet").stdout
    assert any(len(line) > 70 and "pixels" in line for line in piped.splitlines())
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("FEATPROBE_WORKSPACE", "COLUMNS")}
    command = [sys.executable, "-m", "featprobe", "data", "check", str(folder), "--quiet"]
    with subprocess.Popen(command, stdout=ours, stderr=ours, env=environment) as process:
        os.close(ours)
        shown = b""
        with contextlib.suppress(OSError):  # the other side was closed
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    tables = shown.decode().replace("\r", "").partition("class")[2].partition("pixels: median")[0]
    assert name in tables and tables.count("background") == 2
    assert max(map(len, tables.splitlines())) <= 70, tables
    assert process.returncode == child("data", "check", folder, "--quiet").returncode


HEARD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has its background jobs ignore
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_closed_pipe_and_an_interruption_end_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "featprobe", "--workspace", str(tmp_path)]
    with subprocess.Popen([*command, "cache", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    wanted = [*command, "data", "make", "surface", "--images", "20000", "--size", "512x512"]  # minutes
    heard = [sys.executable, "-c", HEARD, *wanted]
    with subprocess.Popen(heard, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (tmp_path / "data").is_dir():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate()
    assert out == b"" and said.startswith(b"featprobe: Stopped by Ctrl-C. ") and said.count(b"\n") == 1
    assert process.returncode == 130
    assert not list((tmp_path / "data").iterdir())


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of masks in a folder."""
    return write_set(tmp_path_factory.mktemp("images") / "parts", 6, (32, 32))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "convnext_dinov4"], "Did you mean convnext_dinov3"),
        ([*NETWORK, "--data", "xrei"], "Did you mean xray"),
        ([*NETWORK, "--data", "nowhere/at/all"], "no data set 'nowhere/at/all'"),
        ([*NETWORK, "--levels", "stride4,stride5"], "no level 'stride5'"),
        ([*NETWORK, "--size", "big"], "'big' is not a size. wanted: HxW"),
        ([*NETWORK, "--size", "0x64"], "is not a size"),
        ([*NETWORK, "--size", "00x64"], "is not a size"),
        ([*NETWORK, "--size", "64"], "is not a size"),
        ([*NETWORK, "--intensity", "percentile:9"], "is not an intensity policy"),
        ([*NETWORK, "--intensity", "window:9:3"], "is not an intensity policy"),
        ([*NETWORK, "--shard", "4/3"], "no shard 4/3"),
        ([*NETWORK, "--device", "tpu"], "no device 'tpu' here"),
        ([*NETWORK, "--device", "cpu:first"], "no device 'cpu:first' here"),
        ([*NETWORK, "--final-norm"], "no final norm"),
        (["--backbone", "resnet18", "--weights", "nowhere.pth"], "no weights file nowhere.pth"),
    ],
)
def test_what_extract_is_wrongly_asked_for_is_answered_in_one_paragraph(
    images: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    data = [] if "--data" in arguments else ["--data", images]
    for command in ("extract", "plan") if "--shard" not in arguments else ("extract",):
        assert said in refusal(tmp_path, command, *arguments, *data, "--quiet", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", *NETWORK, "--data", "xray", "--shard", "three"], "wanted: I/N"),
        (["extract", *NETWORK, "--data", "xray", "--weights", "a.pth"], "exclude each other"),
        (["extract", *NETWORK, "--data", "xray", "--batch-size", "0"], "--batch-size"),
        (["extract", *NETWORK, "--data", "xray", "--dtype", "fp8"], "'fp8' is not one of"),
        (["probe", "--seeds", "0"], "--seeds"),
        (["data", "make", "wood"], "'wood' is not one of"),
        (["data", "show", "xray"], "Missing option '--out'"),
        (["data", "show", "xray", "--out", "sheet.jpg"], "--out sheet.jpg: the picture is a PNG file"),
        (["data", "info", "../nowhere/parts"], "There is no data set '../nowhere/parts': nothing lies at this"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refusal(tmp_path, *arguments, code=2)


def test_a_workspace_that_is_a_file_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file", "data", code=2)


def test_a_workspace_that_can_not_be_written_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "space"
    assert "can't be written" in refusal(nowhere, "extract", *NETWORK, "--data", images, "--quiet")
    assert "can't be written" in refusal(nowhere, "data", "make", "xray", "--images", 12, "--size", "32x32")
    sheet = tmp_path / "file" / "a.png"
    assert f"{sheet} can't be written" in refusal(tmp_path, "data", "show", images, "--out", sheet)


def test_without_any_cache_the_way_to_one_is_told(tmp_path: Path) -> None:
    for arguments in (["probe"], ["probe", "--data", "xray"], ["probe", "--backbone", "embedded"]):
        text = refusal(tmp_path, *arguments)
        assert "featprobe extract" in text and "Known: ." not in text
    for words in ("info", "verify", "rm"):
        assert "No cache in" in refusal(tmp_path, "cache", words, "xray")
    assert "featprobe extract" in call(tmp_path, "cache", "ls").stdout
    assert call(tmp_path, "cache", "verify").exit_code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data", "can't be read as TOML"),
        ("[dta.x]\npath = 'a'", "dta: unknown. Did you mean data?"),
        ("data = 3", "data: wanted a table, found 3"),
        ("[data]\nx = 'a'", 'data.x: wanted a table, found "a"'),
        ("[data.x]\npath = 'a'\npth = 'b'", "data.x.pth: unknown. Did you mean path?"),
        ("[data.x]\nsize = '32x32'", "data.x.path: it is missing"),
        ("[data.x]\npath = 3", "data.x.path: wanted a text, found 3"),
        ("[data.x]\npath = 'a'\nsize = 64", "data.x.size: wanted a text, found 64"),
        ("[data.x]\npath = 'a'\nfit = 'crop'", 'data.x.fit: wanted resize or letterbox, found "crop"'),
        ("[data.x]\npath = 'a'\nsize = '64'", "data.x.size: '64' is not a size"),
        ("[data.x]\npath = 'a'\nintensity = 'bright'", "data.x.intensity: 'bright' is not an intensity policy"),
        ("[data.x]\npath = 'a'\ntile = 0.5", "data.x.tile: wanted a whole number, found 0.5"),
        ("[data.x]\npath = 'a'\ntile = true", "data.x.tile: wanted a whole number, found true"),
        ("[data.x]\npath = 'a'\ntile = -8", "data.x: Images can't be cut into tiles of -8 pixels"),
        ("[data.x]\npath = 'a'\ntile = 8\noverlap = 8", "0 <= --overlap < T"),
        ("[data.x]\npath = 'a'\ntile = 8\nempty_tiles = 2", "--empty-tiles 2"),
        ("[data.x]\npath = 'a'\noverlap = 8", "data.x: --overlap and --empty-tiles say how tiles are cut"),
        ("[data.x]\npath = 'a'\ntile = 8\nfit = 'resize'", "data.x: Tiles keep their scale"),
        ("[data.x]\npath = 'a'\nviews = ['hflip']", 'data.x.views: wanted a text, found ["hflip"]'),
        ("[data.x]\npath = 'a'\nviews = 'sideways'", "data.x.views: 'sideways' is not a list of views"),
        ("[data.x]\npath = 'a'\npixel_size = '0.05'", 'data.x.pixel_size: wanted a number or a list, found "0.05"'),
        (
            "[data.x]\npath = 'a'\npixel_size = 0",
            "data.x.pixel_size: 0 is not the size of a pixel. wanted: millimetres",
        ),
        ("[data.x]\npath = 'a'\npixel_size = [0.1]", "data.x.pixel_size"),
        ("[data.x]\npath = 'a'\npixel_size = [0.1, -0.1]", "data.x.pixel_size: [0.1, -0.1] is not the size of a pixel"),
        ("[data.x]\npath = 'a'\npixel_size = nan", "data.x.pixel_size: wanted"),
        ("[backbones.x]\nweights = 'a.pth'", "backbones.x.model: it is missing"),
        (
            "[backbones.x]\nmodel = 'resnet18'\nfinal_norm = 'yes'",
            'backbones.x.final_norm: wanted true or false, found "yes"',
        ),
    ],
)
def test_a_broken_configuration_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "featprobe.toml").write_text(text)
    for arguments in (["data"], ["backbones"], ["cache", "ls"]):
        found = refusal(tmp_path, *arguments)
        assert said in found and str(tmp_path / "featprobe.toml") in found


def test_a_configuration_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "featprobe.toml").write_bytes(b"\xff\xfe")
    assert "can't be read as TOML" in refusal(tmp_path, "data")


def test_names_of_the_configuration_can_be_asked_for(images: Path, tmp_path: Path) -> None:
    (tmp_path / "featprobe.toml").write_text(
        f"[data.castings]\npath = '{images}'\nsize = '64x96'\nfit = 'letterbox'\n"
        "[backbones.ours]\nmodel = 'tf_efficientnet_lite0'\nrandom_init = true\n"
    )
    assert "castings" in call(tmp_path, "data").stdout and "ours" in call(tmp_path, "backbones").stdout
    result = call(tmp_path, "extract", "--backbone", "ours", "--data", "castings", "--quiet", "--json")
    assert result.exit_code == 0
    recipe = read_contents(find_file(tmp_path)).recipe
    assert (recipe.label, recipe.size, recipe.fit) == ("ours-random", (64, 96), "letterbox")


def test_tiles_and_views_of_the_configuration_give_the_cache_of_the_same_options(images: Path, tmp_path: Path) -> None:
    (tmp_path / "featprobe.toml").write_text(
        f"[data.scans]\npath = '{images}'\nsize = '24x24'\ntile = 16\noverlap = 4\nempty_tiles = 1\nviews = 'hflip'\n"
        f"[data.whole]\npath = '{images}'\nsize = '32x32'\n"
    )

    def planned(data: str, *options: object) -> tuple[str, int]:
        plan = json.loads(call(tmp_path, "plan", *NETWORK, "--data", data, *options, "--quiet", "--json").stdout)
        return Path(plan["path"]).name, plan["rows"]

    same = ("--size", "24x24", "--tile", "16", "--overlap", "4", "--empty-tiles", "1.0", "--views", "hflip")
    assert planned("scans") == planned("whole", *same)
    assert planned("scans", "--tile", "0", "--views", "none") == planned("whole", "--size", "32x32")
    assert planned("scans", "--tile", "0") == planned("whole", "--size", "32x32", "--views", "hflip")
    tile = ("--tile", "32", "--overlap", "4", "--views", "vflip")
    assert planned("scans", "--tile", "32", "--views", "vflip") == planned("whole", *tile)
    assert len({planned("scans"), planned("whole"), planned("scans", "--tile", "0"), planned("whole", *tile)}) == 4
    made = call(tmp_path, "extract", *NETWORK, "--data", "scans", "--quiet", "--json")
    assert Path(json.loads(made.stdout)["path"]).name == planned("scans")[0]
    assert "--tile 16 --overlap 4 --empty-tiles 1 --views hflip" in read_contents(find_file(tmp_path)).command


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("no image", "not an image"), ("mask size", "another size"), ("label", "beyond the classes")],
)
def test_a_bad_sample_stops_extract_by_name_and_may_be_left_out(tmp_path: Path, spoil: str, said: str) -> None:
    data = write_set(tmp_path / "parts", 8, (32, 32))
    if spoil == "no image":
        (data / "images" / "part02.png").write_text("nothing")
    else:
        mask = np.full((32, 32) if spoil == "label" else (16, 32), 3 if spoil == "label" else 1, dtype=np.uint8)
        Image.fromarray(mask).save(data / "masks" / "part02.png")
    text = refusal(tmp_path, "extract", *NETWORK, "--data", data, "--quiet")
    assert said in text and "part02" in text
    result = call(tmp_path, "extract", *NETWORK, "--data", data, "--quiet", "--skip-bad")
    assert result.exit_code == 0 and "left out: part02.png" in result.stdout


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--debug", "--workspace", str(tmp_path), "probe"])
    assert isinstance(result.exception, featprobe.FeatprobeError)


@pytest.mark.slow
def test_real_processes_end_with_the_same_codes(tmp_path: Path) -> None:
    result = child("--workspace", tmp_path, "probe")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("featprobe: There is no feature cache") and "Traceback" not in result.stderr
    assert child("--workspace", tmp_path, "prob").returncode == 2


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a generated set and its cache."""
    root = tmp_path_factory.mktemp("space")
    made = call(root, "data", "make", "xray", "--images", 24, "--size", "64x64")
    assert made.exit_code == 0 and "24 images of 64x64" in made.stdout
    extracted = call(root, "extract", *NETWORK, "--data", "xray", "--quiet")
    assert extracted.exit_code == 0 and "24 of 24 images computed" in extracted.stdout
    return root


def as_json(workspace: Path, *arguments: object) -> Any:
    """What a command prints with --json, which is one JSON value and nothing else."""
    result = call(workspace, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_set_that_is_there_is_not_made_again(space: Path) -> None:
    assert "holds a data set already" in refusal(space, "data", "make", "xray")


def test_data_is_listed_described_and_drawn(space: Path, tmp_path: Path) -> None:
    assert re.search(r"xray .* built in, there\n", call(space, "data").stdout)
    text = call(space, "data", "info", "xray").stdout
    assert "24 images, 16-bit, 64x64 (height x width)" in text and "labels for semseg, detect, instseg" in text
    summary = as_json(space, "data", "info", "xray")
    assert sum(summary["images"].values()) == 24 and summary["depth"] == 16
    assert sum(summary["pixels"].values()) == pytest.approx(1)
    result = call(space, "data", "show", "xray", "--out", tmp_path / "sheet", "--count", 3)
    assert result.exit_code == 0 and "3 images of train" in result.stdout
    with Image.open(tmp_path / "sheet") as sheet:
        assert sheet.format == "PNG" and sheet.height > 3 * 256


def test_a_drawn_split_shows_images_without_labels_too_where_more_are_asked_for(tmp_path: Path) -> None:
    root = write_set(tmp_path / "parts", 6, (32, 32))
    for mask in sorted((root / "masks").rglob("*.png"))[:2]:
        with Image.open(mask) as image:
            plain = Image.new(image.mode, image.size)
        plain.save(mask)
    count = as_json(tmp_path, "data", "info", root)["images"]["train"]
    shown = call(tmp_path, "data", "show", root, "--out", tmp_path / "sheet.png", "--count", 99).stdout
    assert f"{count} images of train" in shown


def test_the_first_file_that_can_not_be_used_names_the_command_that_lists_all(tmp_path: Path) -> None:
    root = write_set(tmp_path / "parts", 6, (32, 32))
    image = sorted((root / "images").rglob("*.png"))[0]
    image.write_bytes(b"")
    for words in (
        ["info", root],
        ["split", root, "--out", tmp_path / "s.csv"],
        ["convert", root, "--out", tmp_path / "c"],
    ):
        said = refusal(tmp_path, "data", *words)
        assert "is an empty file" in said and f"All files that can't be used:  featprobe data check {root}" in said
    said = refusal(tmp_path, "data", "info", image)
    assert f"Name the folder: {image.parent}" in said and "--format" not in said


def test_a_study_says_once_why_several_of_its_trainings_failed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    study = tmp_path / "study.toml"
    study.write_text(
        f'data = ["{images}"]\nbackbones = ["embedded"]\nregimes = ["frozen"]\nseeds = 2\nsizes = ["64x64"]\n'
    )
    ended = call(tmp_path, "study", study)
    said = ended.stderr[ended.stderr.rindex("[1/1]") :].splitlines()[2:]
    assert ended.exit_code == 3 and [line.startswith("failed: ") for line in said[:3]] == [True, True, False]
    assert all(line.startswith("  ") for line in said[2:]) and sum("can't be written" in line for line in said) == 1


def test_a_demo_ends_with_the_command_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featprobe.stages.demo.demo", lambda *_: None)
    monkeypatch.setattr("featprobe.cli.head_commands.show_probe", lambda *_: None)
    assert call(tmp_path, "demo").stdout.endswith(f"featprobe --workspace {tmp_path} compare\n")
    monkeypatch.chdir(tmp_path)
    assert call(Path(), "demo").stdout.endswith("  featprobe compare\n")


def test_backbones_are_listed_with_licences(space: Path) -> None:
    assert re.search(r"convnext_dinov3 .*dinov3-license", call(space, "backbones").stdout)
    rows = as_json(space, "backbones", "*dinov3*")
    assert {"name", "model", "weights", "licence"} == set(rows[0])
    assert "No pretrained model of timm matches" in refusal(space, "backbones", "no such model", code=2)


def test_extract_again_does_nothing_and_says_so(space: Path) -> None:
    result = call(space, "extract", *NETWORK, "--data", "xray", "--quiet")
    assert "complete (24 images); nothing to do" in result.stdout
    report = as_json(space, "extract", *NETWORK, "--data", "xray", "--quiet")
    assert report["computed"] == 0 and report["missing"] == 0 and Path(report["path"]) == find_file(space)


def test_plan_states_costs_and_makes_nothing(space: Path, tmp_path: Path) -> None:
    data = space / "data" / "xray"
    text = call(tmp_path, "plan", *NETWORK, "--data", data, "--quiet").stdout
    assert "24 at 64x64, levels stride4, stride8, stride16, stride32" in text and "pays from" in text
    assert not (tmp_path / "cache").exists()
    cost = as_json(space, "plan", *NETWORK, "--data", "xray", "--quiet")
    assert cost["exists"] and cost["fits_disk"] and cost["images"] == 24
    cache = Cache(find_file(space), read_contents(find_file(space)))
    assert cost["feature_bytes"] == cache.recipe.row_bytes * 24


def test_caches_are_listed_and_described(space: Path) -> None:
    assert "24 of 24" in call(space, "cache", "ls").stdout
    (listed,) = as_json(space, "cache", "ls")
    (described,) = as_json(space, "cache", "info", "xray")
    assert listed == described
    assert described["whole"] == 24 and described["intact"] and described["recipe"]["label"].endswith("-random")
    text = call(space, "cache", "info", find_file(space)).stdout
    assert described["version"] == 3 and re.search(r"version +3\n", text)
    assert "24 whole, 0 missing, 0 unreadable of 24" in text and "64x64 (resize to 64x64)" in text


def test_a_flipped_byte_is_found_with_code_3_and_mended_by_extract(space: Path) -> None:
    path = find_file(space)
    before = path.read_bytes()
    flip_byte(path, read_contents(path).extents["features/stride8"].offset + 1000)
    found = call(space, "cache", "verify", "--quiet")
    assert found.exit_code == 3 and "1 bad" in found.stdout and "features/stride8" in found.stdout
    (row,) = re.findall(r"row (\d+) is now marked as missing", found.stdout)
    cache = Cache(path, read_contents(path))
    assert np.flatnonzero(cache.done == MISSING).tolist() == [int(row)]
    again = call(space, "cache", "verify", "--quiet")
    assert (
        again.exit_code == 0
        and "sound, but 1 of 24 rows is missing. To finish it, run:  featprobe extract" in again.stdout
    )
    assert "featprobe extract" in refusal(space, "probe")
    assert "1 of 24 rows are missing" in refusal(space, "probe", "--data", "xray")
    mended = call(space, "extract", *NETWORK, "--data", "xray", "--quiet")
    assert "1 of 24 images computed" in mended.stdout
    assert call(space, "cache", "verify", "--quiet").exit_code == 0
    assert as_json(space, "cache", "verify", "xray", "--quiet") == {str(path): []}
    assert path.read_bytes() == before


def test_the_hint_on_a_file_that_can_not_be_opened_works(space: Path) -> None:
    path = find_file(space)
    path.write_bytes(path.read_bytes()[:1000])
    found = call(space, "cache", "verify", "--quiet")
    assert found.exit_code == 3
    (command,) = re.findall(r"Remove it: featprobe (cache rm \S+ --yes)\. Then run the extract command", found.stdout)
    assert call(space, *command.split()).exit_code == 0
    assert "24 of 24 images computed" in call(space, "extract", *NETWORK, "--data", "xray", "--quiet").stdout


def test_predict_says_what_a_folder_without_a_head_holds(tmp_path: Path) -> None:
    for seed in ("seed0", "seed1"):
        (tmp_path / "run" / seed).mkdir(parents=True)
        (tmp_path / "run" / seed / "card.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "new").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "new" / "a.png")
    said = refusal(tmp_path, "predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "out")
    assert "holds no head itself, but seed0, seed1. Name one of them." in said
    said = refusal(tmp_path, "predict", tmp_path / "bare", tmp_path / "new", "--out", tmp_path / "out")
    assert "no card.json" in said and "Train it again" in said


PROBE = ("probe", "--iterations", 20, "--batch-size", 8, "--quiet")


def test_probe_trains_scores_saves_and_draws(space: Path) -> None:
    result = call(space, *PROBE, "--task", "semseg", "--seeds", 1, "--show", 2)
    assert result.exit_code == 0, result.output
    assert "fg mIoU" in result.stdout and "xray" in result.stdout
    sheet = Path(re.search(r"pictures: (\S+)", result.stdout)[1])  # type: ignore[index]
    with Image.open(sheet) as image:
        assert image.height > 2 * 256
    row = json.loads((space / "probes" / "results.jsonl").read_text().splitlines()[-1])
    assert row["task"] == "semseg" and row["data"] == "xray" and 0 <= row["test"]["miou"] <= 1
    folder = space / "probes" / row["folder"]
    assert sheet.parent == folder
    head, card = load_head(folder, read_contents(find_file(space)).recipe)
    assert card["result"]["test"] == row["test"] and not head.training


def test_the_same_probe_twice_gives_the_same_scores_and_another_seed_others(space: Path) -> None:
    first = as_json(space, *PROBE, "--seeds", 2)
    second = as_json(space, *PROBE)
    assert [row["seed"] for row in first] == [0, 1]
    assert second[0]["test"] == first[0]["test"] and second[0]["val"] == first[0]["val"]
    assert first[1]["val"] != first[0]["val"] or first[1]["test"] != first[0]["test"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "semsg"], "no task 'semsg'. Did you mean semseg"),
        (["--task", "detect", "--head", "linear"], "no detect head 'linear'"),
        (["--loss", "ce+dise"], "no loss 'dise'. Did you mean dice"),
        (["--fraction", "2"], "0 < F <= 1"),
        (["--head", "lineer"], "Did you mean linear"),
        (["--levels", "stride2"], "no level 'stride2' here"),
        (["--data", "surfase"], "no cache of the data set 'surfase' in {cache}. Did you mean surface"),
        (["--backbone", "tf_efficientnet"], "no cache of the backbone 'tf_efficientnet'"),
        (["--lr", "-1"], "lr = -1.0"),
        (["--lr", "nan"], "lr = nan"),
        (["--weight-decay", "-1"], "weight_decay = -1.0"),
        (["--device", "tpu"], "no device 'tpu' here"),
    ],
)
def test_what_probe_is_wrongly_asked_for_is_answered_in_one_paragraph(
    space: Path, arguments: list[str], said: str
) -> None:
    assert said.format(cache=space / "cache") in refusal(space, "probe", "--quiet", *arguments, code=2)


def test_what_has_no_cache_yet_is_no_wrong_word(space: Path) -> None:
    """A script can tell what is misspelt, code 2, from what is not there yet, code 1."""
    assert "no cache of the data set 'surface'" in refusal(space, "probe", "--data", "surface")
    assert "No cache in" in refusal(space, "cache", "info", "surface")
    assert "No cache in" in refusal(space, "cache", "info", "surfase", code=2)
    for words in (["info", "xrai"], ["split", "xrai", "--out", "split.csv"], ["info", "xray", "--format", "koko"]):
        assert "Did you mean" in refusal(space, "data", *words, code=2)


def test_probes_that_can_not_be_written_are_refused_before_training(space: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(space / "cache")
    (tmp_path / "probes").write_text("in the way")
    assert "can't be written" in refusal(tmp_path, "probe", "--quiet")


def spoiled(space: Path, root: Path, how: str) -> Path:
    """A workspace whose only cache is spoiled."""
    path = root / "cache" / "xray-123456" / "net-12345678.h5"
    path.parent.mkdir(parents=True)
    path.write_bytes(find_file(space).read_bytes())
    if how == "no HDF5":
        path.write_bytes(b"this is no HDF5 file" * 1000)
    elif how == "newer":
        with path.open("r+b") as stream:
            stream.seek(8)
            stream.write(bytes([99]))
    elif how == "other HDF5":
        path.unlink()
        with h5py.File(path, "w") as file:
            file["x"] = [1]
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no HDF5", "is not a feature cache that can be opened"),
        ("newer", "is of a newer format than this featprobe reads"),
        ("other HDF5", "is HDF5, but not a feature cache"),
        ("cut", "is not a feature cache that can be opened"),
    ],
)
def test_a_cache_that_can_not_be_read_is_named_and_can_be_removed(
    space: Path, tmp_path: Path, how: str, said: str
) -> None:
    path = spoiled(space, tmp_path, how)
    for arguments in (["probe", "--quiet"], ["cache", "info", "net"]):
        text = refusal(tmp_path, *arguments)
        assert said in text and str(path) in text
    listed = call(tmp_path, "cache", "ls")
    assert listed.exit_code == 0 and said in listed.stderr
    assert said in as_json(tmp_path, "cache", "ls")[0]["error"]
    assert call(tmp_path, "cache", "rm", "net", "--yes").exit_code == 0
    assert not path.exists()


def test_rm_asks_first(space: Path, tmp_path: Path) -> None:
    path = spoiled(space, tmp_path, "no")
    for said in ("n\n", ""):  # a no, and nobody who answers
        refused = call(tmp_path, "cache", "rm", "xray", input=said)
        assert refused.exit_code == 1 and "Nothing was removed. With --yes" in refused.stderr
    assert path.exists()
    assert call(tmp_path, "cache", "rm", "xray", input="y\n").exit_code == 0
    assert [own.name for own in path.parent.iterdir()] == [f".{path.stem}.lock"]


def test_rm_of_a_name_means_the_workspace_and_of_a_path_only_caches(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoiled(space, tmp_path, "no")
    beside = tmp_path / "beside"
    beside.mkdir()
    monkeypatch.chdir(beside)
    (beside / "net").write_text("thesis")
    assert "cache rm" not in refusal(tmp_path, "cache", "info", str(beside / "net"))  # no advice to remove other files
    with h5py.File(beside / "model.h5", "w") as file:
        file["weights"] = [1]
    for name, said in {"model.h5": "HDF5, but not a feature cache", str(beside / "net"): "not a feature cache"}.items():
        text = refusal(tmp_path, "cache", "rm", name, "--yes")
        assert said in text and "Nothing was removed" in text
    for every in (".", "./", "/"):  # of a path, not a part of all names
        assert "is called" in refusal(tmp_path, "cache", "rm", every, "--yes", code=2) and path.exists()
    cut = beside / "cut.h5"
    cut.write_bytes(path.read_bytes()[:1000])
    assert call(tmp_path, "cache", "rm", "cut.h5", "--yes").exit_code == 0 and not cut.exists()
    assert call(tmp_path, "cache", "rm", "net", "--yes").exit_code == 0 and not path.exists()
    assert (beside / "net").read_text() == "thesis" and (beside / "model.h5").exists()


def test_a_real_process_verifies_with_code_3(space: Path, tmp_path: Path) -> None:
    path = spoiled(space, tmp_path, "no")
    flip_byte(path, read_contents(path).extents["features/stride4"].offset)
    result = child("--workspace", tmp_path, "cache", "verify", "--json", "--quiet")
    assert result.returncode == 3 and result.stderr == ""
    ((found,),) = json.loads(result.stdout).values()
    assert found["part"] == "features/stride4" and found["row"] == 0


def test_the_workspace_may_come_from_the_environment(space: Path) -> None:
    result = CliRunner().invoke(cli, ["cache", "ls", "--json"], env={"FEATPROBE_WORKSPACE": str(space)})
    assert [entry["path"] for entry in json.loads(result.stdout)] == [str(find_file(space))]
    assert (Cache(find_file(space), read_contents(find_file(space))).done == WHOLE).all()
