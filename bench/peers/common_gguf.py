"""What the GGUF side of the comparisons shares."""

import argparse
import pathlib

import gguf

FILE = pathlib.Path(__file__).resolve().parent.parent / "work/q8_0.gguf"


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    return parser


def weight_bytes():
    """Bytes of the matrices that one token reads: all of them, the tied embedding as the head."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(FILE).tensors if len(tensor.shape) == 2)
