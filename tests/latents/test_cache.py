"""Tests of ldm.latents.cache: cached moments and their contract."""

import dataclasses
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data.images import ImageData, verify_images
from ldm.errors import UserError
from ldm.latents.cache import latents_folder, open_latents, verify_latents
from ldm.latents.contract import LatentContract
from ldm.latents.statistics import measure_statistics


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Downsample by 4. Flipped images have different moments, and the log-variance differs from the mean."""
    mean = F.avg_pool2d(pixels * torch.linspace(0.5, 1.5, 8), 4)
    return mean, 0.3 * mean.flip(1) - 1


def fail_on_cache_miss(pixels):
    raise AssertionError("these latents should be in the cache")


@pytest.mark.parametrize("batch_size", [7, 64])
def test_cached_moments_equal_direct_encoding(images, contract, tmp_path, batch_size):
    latents = open_latents(encode, contract, images, cache_dir=tmp_path, batch_size=batch_size)
    assert latents.shape == (3, 2, 2)
    for indices in (images.train_indices, images.val_indices, np.array([29, 0, 29])):
        torch.testing.assert_close(latents.batch(indices), encode(images.batch(indices)), rtol=0, atol=0)


def test_second_view_encodes_the_flipped_image(images, contract, tmp_path):
    contract = dataclasses.replace(contract, flip=True)
    latents = open_latents(encode, contract, images, cache_dir=tmp_path)
    pixels = images.batch(range(30))
    torch.testing.assert_close(latents.batch(range(30), view=0), encode(pixels), rtol=0, atol=0)
    torch.testing.assert_close(latents.batch(range(30), view=1), encode(pixels.flip(-1)), rtol=0, atol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_measured_statistics_match_sampled_latents(images, contract, tmp_path, flip):
    """Compare the statistics, from the law of total variance, with those of many samples from every posterior."""
    contract = dataclasses.replace(contract, flip=flip)
    latents = open_latents(encode, contract, images, cache_dir=tmp_path)
    mean, std = measure_statistics(latents, images.train_indices, batch_size=5)
    views = [latents.batch(images.train_indices, view) for view in range(1 + flip)]
    centre, log_variance = (torch.cat(parts).double() for parts in zip(*views, strict=True))
    noise = torch.randn(4000, *centre.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = centre + (0.5 * log_variance).exp() * noise
    torch.testing.assert_close(torch.tensor(mean).double(), z.mean((0, 1, 3, 4)), rtol=0, atol=0.005)
    torch.testing.assert_close(torch.tensor(std).double(), z.std((0, 1, 3, 4)), rtol=0.005, atol=0)


def test_contract_mismatch_lists_every_differing_field_with_both_values(contract):
    other_contract = dataclasses.replace(contract, factor=8, autoencoder_sha256="b" * 64, flip=True)
    with pytest.raises(UserError) as error_info:
        contract.check(other_contract, "this run", "that cache")
    message = str(error_info.value)
    assert re.search(r"factor\b[^;]*\b4\b[^;]*this run[^;]*\b8\b[^;]*that cache", message)
    for detail in ("flip is False", "a" * 64, "b" * 64):
        assert detail in message
    for field in ("resolution", "channels", "data_fingerprint", "dtype"):
        assert field not in message
    contract.check(dataclasses.replace(contract), "this run", "an equal contract")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((29, 1, 2, 3, 2, 2), "float32"), ((30, 1, 2, 4, 2, 2), "float32"), ((30, 1, 2, 3, 2, 2), "f2")],
)
def test_open_rejects_moments_of_wrong_shape_or_dtype(images, contract, tmp_path, shape, dtype):
    folder = open_latents(encode, contract, images, cache_dir=tmp_path).path
    (folder / "chunks.json").unlink()  # older caches have no digests
    np.save(folder / "moments.npy", np.zeros(shape, dtype))
    with pytest.raises(UserError, match=r"contract.* float32 \(30, 1, 2, 3, 2, 2\).*Delete that folder"):
        open_latents(fail_on_cache_miss, contract, images, cache_dir=tmp_path)


def test_encoding_rejects_non_finite_latents(images, contract, tmp_path):
    def diverged_encode(pixels):
        mean, log_variance = encode(pixels)
        return mean, torch.where(mean == mean.max(), torch.inf, log_variance)

    with pytest.raises(UserError, match=r"images 0 to 29 .*not finite.*diverged.*lower learning rate"):
        open_latents(diverged_encode, contract, images, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_insufficient_disk_space_is_reported_before_writing(images, contract, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.latents.cache.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"cache_dir=.*0\.0 GB free.*need.*(?i:free some)"):
        open_latents(fail_on_cache_miss, contract, images, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_every_contract_field_changes_the_cache_folder(images, contract, tmp_path):
    """Contracts that differ in a single field must not share a cache."""
    folders = {latents_folder(contract, tmp_path)}
    for field in dataclasses.fields(LatentContract):
        value = getattr(contract, field.name)
        new_value = {str: f"{value}x", int: 7, float: 0.123, bool: True}[type(value)]
        folders.add(latents_folder(dataclasses.replace(contract, **{field.name: new_value}), tmp_path))
    assert len(folders) == 1 + len(dataclasses.fields(LatentContract))


@pytest.mark.parametrize("flip", [False, True])
def test_cache_with_legacy_folder_name_is_used(images, contract, tmp_path, flip):
    contract = dataclasses.replace(contract, flip=flip)
    path = open_latents(encode, contract, images, cache_dir=tmp_path).path
    legacy_folder = path.rename(tmp_path / f"latents-{'a' * 12}-{images.fingerprint[:12]}{'-flip' * flip}")
    assert open_latents(fail_on_cache_miss, contract, images, cache_dir=tmp_path).path == legacy_folder
    contract, images = dataclasses.replace(contract, val_fraction=0.4), ImageData.open(images.path, 0.4)
    assert open_latents(encode, contract, images, cache_dir=tmp_path).path != legacy_folder


def test_verify_detects_a_changed_byte_despite_unchanged_modification_time(images, contract):
    """`open_latents` trusts a file whose size and modification time are unchanged, but `verify_latents` reads it."""
    folder = open_latents(encode, contract, images, cache_dir=images.path.parent).path
    file = folder / "moments.npy"
    os.utime(file, ns=(0, 10**9))
    assert list(verify_latents(images)) == [folder]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 10**9))
    open_latents(fail_on_cache_miss, contract, images, cache_dir=images.path.parent)
    with pytest.raises(UserError, match=r"moments\.npy.*modified.*images: 0 to 29"):
        list(verify_latents(images))
    assert verify_images(images) == images.path
    shutil.rmtree(folder)
