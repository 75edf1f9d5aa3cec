"""The model and the measurement shared by the PyTorch side of the comparisons."""

import argparse
import json
import pathlib
import platform
import resource
import sys
import time

import torch
import transformers

WORK = pathlib.Path(__file__).resolve().parent.parent / "work"
SHAPE = dict(  # SmolLM2-135M
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)

# Common words, to make texts of a known number of tokens from.
WORDS = """the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them these so
some her would make like him into time has look two more write go see number no way could people my than first water been call
who oil its now find long down day did get come made may part""".split()


def model(dtype=torch.float32, device="cpu"):
    """A decoder of SmolLM2-135M's shape with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config).to(device, dtype)


def setup(threads):
    torch.set_num_threads(threads)


def synchronize():
    """Waits for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory():
    """Bytes; the high-water mark of the process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(work, tokens, repeats, warmup=1):
    """Tokens per second of each repeat."""
    for _ in range(warmup):
        work()
    synchronize()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize()
        rates.append(tokens / (time.perf_counter() - started))
    return rates


def report(**measured):
    """One JSON line: what was measured, memory and versions; the keys are those of the Rust side."""
    packages = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "trl") if name in sys.modules}
    versions = {"python": platform.python_version(), **packages}
    if torch.cuda.is_initialized():
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
        measured["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(measured | {"peak_memory_bytes": peak_memory(), "versions": versions}), flush=True)


def arguments():
    """What every script takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser
