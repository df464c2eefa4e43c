"""ldm.runtime.shell: printed commands work when copied to a shell."""

import shlex
import sys
from pathlib import Path

import pytest

from ldm.runtime import shell

AWKWARD_ARGUMENTS = [
    "python",
    "-m",
    "ldm.train",
    'data.path=it\'s a/"folder"',
    "name=$HOME `x` %PATH%",
    "betas=[0.9,0.99]",
    "x=a;b",
]


def test_posix_quoting_round_trips():
    assert shlex.split(shell.join(AWKWARD_ARGUMENTS, windows=False)) == AWKWARD_ARGUMENTS


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["python", "-m", "ldm.train", "stage=vae"], "python -m ldm.train stage=vae"),
        (["data.path=C:\\My Photos\\a"], '"data.path=C:\\My Photos\\a"'),
        (["data.path=C:\\photos"], "data.path=C:\\photos"),
        (["n=[1,2]", "x=(a)", "y=a&b", "z=@b", "it's"], '"n=[1,2]" "x=(a)" "y=a&b" "z=@b" "it\'s"'),
        (["data.path=C:\\My Photos\\"], '"data.path=C:\\My Photos\\\\"'),
        (["--config-dir=my.configs"], '"--config-dir=my.configs"'),
        (['p=a "b"'], '"p=a \\"b\\""'),
    ],
)
def test_windows_quoting_works_in_cmd_and_powershell(arguments, text):
    """PowerShell splits arguments at commas and options at dots, and @, (, & and ; are special characters."""
    assert shell.join(arguments, windows=True) == text


def test_printed_command_uses_the_current_interpreter(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    interpreter = Path(sys.executable).absolute()
    monkeypatch.setenv("PATH", str(interpreter.parent))
    assert shell.train_command("stage=vae") == "python -m ldm.train stage=vae"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shell.train_command("stage=vae") == f"{interpreter} -m ldm.train stage=vae"
    monkeypatch.chdir(interpreter.parents[1])
    assert shell.train_command() == f"{Path(interpreter.parent.name, interpreter.name)} -m ldm.train", (
        "relative to the working directory"
    )


def test_tool_command_works_from_any_folder(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.chdir(root)
    assert shell.tool_command("sample", "run=a b") == f"python {Path('tools', 'sample.py')} 'run=a b'"
    monkeypatch.chdir(tmp_path)
    assert shell.tool_command("sample") == f"python {root / 'tools' / 'sample.py'}"
