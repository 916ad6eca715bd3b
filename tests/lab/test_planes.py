"""Weights are packed without loss: every bit comes back, and exponents are what gets shorter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from effnb.lab import planes
from effnb.lab._files import data_folder


def _packed(folder):
    planes.pack(folder)
    return (folder / planes.PACKED).read_bytes()


@given(header=st.binary(max_size=9), body=st.binary(max_size=40))
def test_any_bytes_come_back(header, body):
    """Also of odd length, and with a header that is empty."""
    content = len(header).to_bytes(8, "little") + header + body
    assert planes._unsorted(planes._sorted(content)) == content


def test_planes_hold_exponents_and_fractions():
    """1.5: sign 0, exponent 127, fraction 1000000. -2: sign 1, exponent 128, fraction 0."""
    body = torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    found = planes._sorted(bytes(8) + body)[8:]
    assert found == bytes([127, 128, 0b10000000, 0b00000001])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_comes_back(tmp_path, kind):
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40])
    tensors = {"a": torch.randn(33, 7), "b": special, "c": torch.empty(0, 4), "d": torch.ones(1)}
    save_file({name: x.to(kind) for name, x in tensors.items()}, tmp_path / planes.WEIGHTS)
    content = (tmp_path / planes.WEIGHTS).read_bytes()
    packed = _packed(tmp_path)
    (tmp_path / planes.WEIGHTS).unlink()
    planes.unpack(tmp_path, packed)
    assert (tmp_path / planes.WEIGHTS).read_bytes() == content
    assert set(load_file(tmp_path / planes.WEIGHTS)) == set(tensors)
    assert {path.name for path in tmp_path.iterdir()} == {planes.WEIGHTS, planes.PACKED}


def test_exponents_shrink_to_their_entropy(tmp_path):
    """Normal weights of one scale: 8 bits of sign and fraction, and the exponents' entropy."""
    torch.manual_seed(0)
    weights = (0.02 * torch.randn(400_000)).bfloat16()
    save_file({"w": weights}, tmp_path / planes.WEIGHTS)
    exponents = (weights.view(torch.int16).int() >> 7) & 0xFF
    share = torch.bincount(exponents) / len(weights)
    entropy = -(share[share > 0].log2() * share[share > 0]).sum().item()
    bits = 8 * len(_packed(tmp_path)) / len(weights)
    assert 8 + entropy < bits < 1.05 * (8 + entropy)


def test_shipped_weights_are_a_third_smaller_when_packed():
    folder = data_folder() / "models" / "mini-300k"
    ratio = (folder / planes.PACKED).stat().st_size / (folder / planes.WEIGHTS).stat().st_size
    assert ratio < 0.72


def test_no_weights_to_pack(tmp_path):
    with pytest.raises(FileNotFoundError):
        planes.pack(tmp_path)
