"""Kinds of arguments that the benches share: what is wrong is told by argparse, in a line, instead of a trace. It reads no command line."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path


def rounds(text: str) -> int:
    """How often to measure: a whole number from 1. Raises `ArgumentTypeError`."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def model(text: str) -> Path:
    """The directory of a model, which has at least one safetensors file. Raises `ArgumentTypeError`."""
    place = Path(text)
    if not any(place.glob("*.safetensors")):
        raise ArgumentTypeError(f"{text} is not a directory with safetensors files")
    return place
