"""Portability: every module can be imported without POSIX modules and signals, as on Windows."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
IMPORT_EVERYTHING = """
import builtins, importlib, importlib.util, json, os, signal, sys, types, warnings
from pathlib import Path

ROOT = Path(sys.argv[1])
FOLDERS, POSIX = ("ldm", "tools", "tests", "benchmarks", "examples"), ("resource", "fcntl", "pwd", "grp", "termios")
POSIX_FUNCTIONS = ("alarm", "setitimer", "getitimer", "pause", "pthread_kill", "sigwait", "siginterrupt")
ON_WINDOWS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}

windows = types.ModuleType("signal")
for name in dir(signal):
    posix = name.startswith("SIG") and name not in ON_WINDOWS
    if not posix and name not in POSIX_FUNCTIONS:
        setattr(windows, name, getattr(signal, name))

original = builtins.__import__


def import_without_posix(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").partition(".")[0] in FOLDERS:
        if name.partition(".")[0] in POSIX:
            raise ModuleNotFoundError(f"No module named {name!r} here")
        if name == "signal":
            return windows
    return original(name, globals, locals, fromlist, level)


builtins.__import__ = import_without_posix
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")
failed, count = {}, 0
for folder in FOLDERS:
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            count += 1
            if folder == "ldm":
                importlib.import_module(name)
                continue
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        except BaseException as error:
            if type(error).__name__ != "Skipped":
                failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"failed": failed, "count": count}))
"""


def test_all_modules_import_without_posix():
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, str(ROOT)], capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["failed"] == {} and result["count"] > 200


def test_pre_commit_hooks_are_platform_independent():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for hook in hooks:
        program, *_ = hook["entry"].split()
        assert program == "python", hook
