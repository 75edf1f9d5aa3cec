"""The model and the measurement shared by the PyTorch side of the comparisons."""

import json
import os
import platform
import resource
import time

import torch
import transformers

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


def model(dtype=torch.float32):
    """A decoder of SmolLM2-135M's shape with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config).to(dtype)


def setup(threads):
    torch.set_num_threads(threads)


def peak_memory():
    """Bytes; the high-water mark of the process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(work, tokens, repeats, warmup=1):
    """Tokens per second of each repeat."""
    for _ in range(warmup):
        work()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        rates.append(tokens / (time.perf_counter() - started))
    return rates


def report(case, rates):
    """One JSON line: the same keys as the Rust side prints."""
    print(
        json.dumps(
            {
                "case": case,
                "tokens_per_second": rates,
                "peak_memory_bytes": peak_memory(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "threads": torch.get_num_threads(),
                "pid": os.getpid(),
            }
        ),
        flush=True,
    )
