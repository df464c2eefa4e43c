"""ldm.latents.cache: moments of every image under a contract that both sides keep."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data.images import ImageData, verify_images
from ldm.errors import UserError
from ldm.latents.cache import latents_folder, open_latents, verify_latents
from ldm.latents.contract import LatentContract
from ldm.latents.statistics import measure


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f = 4, neither symmetric nor the same for mean and log-variance."""
    mean = F.avg_pool2d(pixels * torch.linspace(0.5, 1.5, 8), 4)
    return mean, 0.3 * mean.flip(1) - 1


def refuse(pixels):
    raise AssertionError("these latents are in the cache")


@pytest.mark.parametrize("batch_size", [7, 64])
def test_cached_moments_equal_direct_encoding(images, contract, tmp_path, batch_size):
    latents = open_latents(encode, contract, images, cache_dir=tmp_path, batch_size=batch_size)
    assert latents.shape == (3, 2, 2)
    for indices in (images.train_indices, images.val_indices, np.array([29, 0, 29])):
        torch.testing.assert_close(latents.batch(indices), encode(images.batch(indices)), rtol=0, atol=0)


def test_the_flipped_view_is_the_mirrored_image(images, contract, tmp_path):
    contract = dataclasses.replace(contract, flip=True)
    latents = open_latents(encode, contract, images, cache_dir=tmp_path)
    pixels = images.batch(range(30))
    torch.testing.assert_close(latents.batch(range(30), view=0), encode(pixels), rtol=0, atol=0)
    torch.testing.assert_close(latents.batch(range(30), view=1), encode(pixels.flip(-1)), rtol=0, atol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_measured_statistics_are_those_of_sampled_latents(images, contract, tmp_path, flip):
    """The law of total variance, against brute force with many draws from every posterior."""
    contract = dataclasses.replace(contract, flip=flip)
    latents = open_latents(encode, contract, images, cache_dir=tmp_path)
    mean, std = measure(latents, images.train_indices, batch_size=5)
    views = [latents.batch(images.train_indices, view) for view in range(1 + flip)]
    centre, log_variance = (torch.cat(parts).double() for parts in zip(*views, strict=True))
    noise = torch.randn(4000, *centre.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = centre + (0.5 * log_variance).exp() * noise
    torch.testing.assert_close(torch.tensor(mean).double(), z.mean((0, 1, 3, 4)), rtol=0, atol=0.005)
    torch.testing.assert_close(torch.tensor(std).double(), z.std((0, 1, 3, 4)), rtol=0.005, atol=0)


def test_a_mismatch_names_both_sides_and_every_field(contract):
    other = dataclasses.replace(contract, factor=8, autoencoder_sha256="b" * 64, flip=True)
    with pytest.raises(UserError) as caught:
        contract.check(other, "this run", "that cache")
    message = str(caught.value)
    for said in ("factor is 4 in this run but 8 in that cache", "flip is False", "a" * 64, "b" * 64):
        assert said in message
    for same in ("resolution", "channels", "data_fingerprint", "dtype"):
        assert f"{same} is" not in message
    contract.check(dataclasses.replace(contract), "one", "its equal")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((29, 1, 2, 3, 2, 2), "float32"), ((30, 1, 2, 4, 2, 2), "float32"), ((30, 1, 2, 3, 2, 2), "f2")],
)
def test_moments_of_another_shape_are_refused(images, contract, tmp_path, shape, dtype):
    folder = open_latents(encode, contract, images, cache_dir=tmp_path).path
    (folder / "chunks.json").unlink()  # a cache of before digests were kept
    np.save(folder / "moments.npy", np.zeros(shape, dtype))
    with pytest.raises(UserError, match="but its contract means float32 .*Delete that folder"):
        open_latents(refuse, contract, images, cache_dir=tmp_path)


def test_latents_that_are_not_finite_are_refused(images, contract, tmp_path):
    def diverged(pixels):
        mean, log_variance = encode(pixels)
        return mean, torch.where(mean == mean.max(), torch.inf, log_variance)

    with pytest.raises(UserError, match="not finite: its training diverged"):
        open_latents(diverged, contract, images, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_too_little_space_is_seen_before_writing(images, contract, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.latents.cache.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"cache_dir=.* has 0\.0 GB free.*free some space"):
        open_latents(refuse, contract, images, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_every_field_that_is_compared_names_the_cache(images, contract, tmp_path):
    """So that a user who changes one of them never meets the cache of another contract."""
    folders = {latents_folder(contract, tmp_path)}
    for field in dataclasses.fields(LatentContract):
        value = getattr(contract, field.name)
        other = {str: f"{value}x", int: 7, float: 0.123, bool: True}[type(value)]
        folders.add(latents_folder(dataclasses.replace(contract, **{field.name: other}), tmp_path))
    assert len(folders) == 1 + len(dataclasses.fields(LatentContract))


@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_under_its_earlier_name_is_used(images, contract, tmp_path, flip):
    contract = dataclasses.replace(contract, flip=flip)
    path = open_latents(encode, contract, images, cache_dir=tmp_path).path
    earlier = path.rename(tmp_path / f"latents-{'a' * 12}-{images.fingerprint[:12]}{'-flip' * flip}")
    assert open_latents(refuse, contract, images, cache_dir=tmp_path).path == earlier
    other = dataclasses.replace(contract, val_fraction=0.4)
    assert open_latents(encode, other, ImageData.open(images.path, 0.4), cache_dir=tmp_path).path != earlier


def test_every_byte_is_compared_on_request(images, contract):
    """Also where a file's size and time say that nothing was written to it."""
    folder = open_latents(encode, contract, images, cache_dir=images.path.parent).path
    file = folder / "moments.npy"
    os.utime(file, ns=(0, 10**9))
    assert list(verify_latents(images)) == [folder]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 10**9))
    open_latents(refuse, contract, images, cache_dir=images.path.parent)
    with pytest.raises(UserError, match="changed since it was encoded: images 0 to 29"):
        list(verify_latents(images))
    assert verify_images(images) == images.path
    shutil.rmtree(folder)
