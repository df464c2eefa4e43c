"""What is installed: the pins, the wheel and the source archive, and the commands that a wheel brings."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMAND = ("-c", "from ldm.cli.main import main; main()")
"""What the console command `ldm` is in a wheel that is not installed."""
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
    if "torchvision" not in group  # such an extra is for a torch build of one's own, which no pin knows
]


def files_of(folder: str) -> set[str]:
    """What a folder of the checkout holds, less the caches."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive and the wheel that was built from it, offline."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory) -> Path:
    """The wheel, unpacked; a folder to put on the import path."""
    (archive,) = built.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(unpacked)
    return unpacked


def run_away_from_the_checkout(wheel: Path, folder: Path, *arguments: str) -> str:
    """Python in an empty folder, with the wheel before anything that is installed; its standard output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_pin_is_one_public_version():
    for name, pin in PINS.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, name
        assert "+" not in specifier.version, f"{name}: a local version exists for some platforms only"


def test_nothing_pinned_ties_torch_to_another_build():
    """torchvision belongs to one torch build; CUDA's libraries belong to one platform."""
    assert not {"torchvision", "torchaudio", "torch-fidelity", "triton"} & PINS.keys()
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_what_is_required_is_pinned_within_its_range(requirement):
    (pin,) = PINS[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version)
    assert not requirement.extras, "an extra may bring what the pins leave out: name its packages instead"


def test_the_source_archive_holds_what_the_checkout_holds(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert files_of("ldm") | files_of("conf") | files_of("tools") | files_of("tests") <= names
    assert files_of("examples") | files_of("benchmarks") <= names
    assert {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"} <= names


def test_the_wheel_holds_configs_and_tools_and_no_tests(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert files_of("ldm") <= names
    assert {f"ldm/{name}" for name in files_of("conf") | files_of("tools")} <= names
    assert {name.partition("/")[0] for name in names} == {"ldm", f"ldm_trainer-{PROJECT['version']}.dist-info"}


def test_one_command_lists_every_tool(wheel):
    entry_points = configparser.ConfigParser()
    entry_points.read(next(wheel.glob("*.dist-info")) / "entry_points.txt", encoding="utf-8")
    assert dict(entry_points["console_scripts"]) == {"ldm": "ldm.cli.main:main"}
    listed = run_away_from_the_checkout(wheel, wheel, *COMMAND, "--help")
    for tool in (ROOT / "tools").glob("[a-z]*.py"):
        assert re.search(rf"^  {tool.stem} +\w", listed, re.MULTILINE), tool


def test_the_wheel_finds_its_own_configs_and_tools(wheel, tmp_path):
    look = "from ldm.runtime.paths import folder; print(folder('conf')); print(folder('tools'))"
    conf, tools = run_away_from_the_checkout(wheel, tmp_path, "-c", look).splitlines()
    assert Path(conf).samefile(wheel / "ldm" / "conf")
    assert Path(tools).samefile(wheel / "ldm" / "tools")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "ldm.train", "--help"),
        (*COMMAND, "train", "--help"),
        (*COMMAND, "sample", "--help"),
    ],
    ids=["module", "ldm train", "ldm sample"],
)
def test_a_command_of_the_wheel_answers_in_any_folder(wheel, tmp_path, arguments):
    assert run_away_from_the_checkout(wheel, tmp_path, *arguments).strip()
    assert not list(tmp_path.iterdir()), "help leaves nothing behind"


STRANGERS = re.compile(
    r"""install\s+(?:-[\w-]+\s+)*["'`]?ldm(?=[\s"'`\[=<>~]|$)|\bldm\[(?:demo|eval|lpips|inception|data|reports|dev)\b"""
)
"""PyPI's `ldm` is another project: whoever is told to install it may get that over ours."""


def test_nothing_tells_users_to_install_another_project():
    folders = ("ldm", "conf", "tools", "docs", "tests", "examples", "benchmarks", ".github")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    texts = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", "")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file.is_file() and file.suffix in texts and file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1)
        if STRANGERS.search(line)
    ]
    assert found == []
    assert all(map(STRANGERS.search, ['pip install "ldm[demo]"', "python -m pip install ldm", "needs ldm[eval]"]))
    assert not any(map(STRANGERS.search, ["pip install 'ldm-trainer[demo]'", "pip install -e .", "import ldm"]))


def test_the_wheel_is_typed(wheel):
    assert (wheel / "ldm" / "py.typed").is_file()
