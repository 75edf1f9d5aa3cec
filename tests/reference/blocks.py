#!/usr/bin/env python3
"""Writes tests/reference/blocks/{blocks.gguf,sha256.txt}: one tensor of every ggml type that posttrain reads, and the
SHA-256 of its values as the Python package `gguf` (0.19) dequantises them.

Run from the top of the repository:  python3 tests/reference/blocks.py
"""

import hashlib
import os
import warnings

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

ROWS, COLUMNS = 3, 512
QUANTISED = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.BF16, T.F16, T.F32]
# The package cannot quantise these; (offsets of the f16 scales in a block).
RANDOM = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}


def main():
    os.makedirs("tests/reference/blocks", exist_ok=True)
    warnings.filterwarnings("ignore")
    random = np.random.default_rng(20240726)
    folder = "tests/reference/blocks"
    writer = GGUFWriter(f"{folder}/blocks.gguf", "blocks")
    lines = []
    for kind in QUANTISED + list(RANDOM):
        if kind in RANDOM:
            # Every bit pattern of the codes and packed scales, under finite scales: uniform bytes with sane f16 in place.
            block, size = GGML_QUANT_SIZES[kind]
            data = random.integers(0, 256, (ROWS, COLUMNS // block, size), dtype=np.uint8)
            for offset in RANDOM[kind]:
                scales = random.normal(0, 0.01, data.shape[:2]).astype(np.float16)
                data[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
            data = data.reshape(ROWS, -1)
        else:
            data = quantize(random.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32), kind)
        values = dequantize(data, kind).astype(np.float32).reshape(ROWS, COLUMNS)
        assert np.isfinite(values).all()
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
        first = " ".join(f"{value:.9g}" for value in values.ravel()[:4])
        lines.append(f"{kind.name} {digest} {first}\n")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(f"{folder}/sha256.txt", "w") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
