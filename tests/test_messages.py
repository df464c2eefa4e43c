"""Messages mention only existing options. Library code mentions none; the command line adds them to library errors."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import ldm
from ldm.cli.arguments import strip_stage_prefix
from ldm.cli.remedies import REMEDIES, keys_in
from tests.option_keys import COMMANDS, all_keys, foreign_keys, keys_of

ROOT = Path(inspect.getfile(ldm)).parent
LIBRARY_PACKAGES = ("diffusion", "autoencoder", "networks", "metrics", "latents")
"""Packages whose errors must not mention options."""
NON_KEYS = {
    *("alt", "charset", "class", "content", "lang", "src", "width"),  # HTML
    *(
        "config",
        "k",
        "latent_channels",
        "learned_variance",
        "ref",
        "revision",
        "vq_embed_dim",
    ),  # arguments, and the reference set of a metric
    *("head_dim", "hidden_dim", "mlp_ratio", "patch_size"),  # arguments of networks
    *("class_labels", "generator", "guidance_scale", "num_inference_steps", "trust_remote_code"),  # of pipelines
    "key",  # placeholder
}
"""Words that can appear before an equals sign without being options."""


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of every string in a node, except docstrings."""
    for child in ast.walk(node):
        if isinstance(body := getattr(child, "body", None), list):
            child.body = [line for line in body if not (isinstance(line, ast.Expr) and is_text(line.value))]  # type: ignore[attr-defined]
    for child in ast.walk(node):
        if is_text(child):
            yield child.lineno, child.value  # type: ignore[attr-defined]


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the strings in functions that raise errors, and in module constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(isinstance(child, ast.Raise) for child in ast.walk(node)):
            yield from texts(node)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            yield from texts(node)


@pytest.mark.parametrize("package", LIBRARY_PACKAGES)
def test_library_errors_do_not_mention_options(package):
    violations = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files(package)
        for line, text in messages(ast.parse(file.read_text(encoding="utf-8")))
        if set(keys_in(text)) & all_keys()
    ]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("file", files("."), ids=lambda file: str(file.relative_to(ROOT)))
def test_options_in_messages_exist(file):
    for line, text in texts(ast.parse(file.read_text(encoding="utf-8"))):
        unknown = (
            {strip_stage_prefix(key) for key in keys_in(text) if not key.startswith("hydra.")} - all_keys() - NON_KEYS
        )
        assert not unknown, f"line {line}: {text}"


@pytest.mark.parametrize("argument", REMEDIES)
def test_options_of_each_remedy_exist_in_one_command(argument):
    for remedy in REMEDIES[argument]:
        assert any(set(keys_in(remedy)) <= keys_of(command) for command in COMMANDS), remedy
        assert not foreign_keys(remedy, next(c for c in COMMANDS if set(keys_in(remedy)) <= keys_of(c)))


def test_foreign_keys_finds_options_of_the_wrong_command():
    assert keys_of("train") >= {"data.path", "network.mlp_ratio", "experiment", "autoencoder.path", "vae", "stage"}
    assert "data.cache_dir" not in keys_of("encode") and keys_of("bench") >= {"perceptual", "perceptual.weight"}
    assert foreign_keys("Choose another disk with data.cache_dir=.", "encode") == ["data.cache_dir="]
    assert foreign_keys("Choose data.cache_dir=, eta=2.", "encode", ["run=data.cache_dir=x"]) == []
    assert foreign_keys("Train one: python -m ldm.train stage=vae 'name=a b' x, or stage=vae.", "encode") == ["stage="]
    assert foreign_keys("Type python tools/encode.py stage=vae.", "train") == ["encode stage="]
