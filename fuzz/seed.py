"""Writes a small seed corpus for each fuzz target to fuzz/corpus/ (a few kilobytes each; not kept in git).

    python3 fuzz/seed.py
"""

import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"


def keep(target: str, name: str, content: bytes | str) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    } | changes


def configs() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}
    gemma = config(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", sliding_window=16, sliding_window_pattern=6,
        rope_local_base_freq=1e4, query_pre_attn_scalar=4, hidden_activation="gelu_pytorch_tanh")
    keep("model_config", "llama", json.dumps(config(rope_scaling=llama3)))
    keep("model_config", "gemma3", json.dumps(gemma))
    for family in ["Qwen2", "Qwen3", "Mistral"]:
        keep("model_config", family.lower(), json.dumps(config(
            architectures=[f"{family}ForCausalLM"], model_type=family.lower(), sliding_window=16)))


def safetensors() -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype, size in [("a", "F32", 4), ("b", "BF16", 2), ("c", "F16", 2)]:
        header[name] = {"dtype": dtype, "shape": [2, 3], "data_offsets": [len(data), len(data) + 6 * size]}
        data += bytes(range(6 * size))
    text = json.dumps(header).encode()
    keep("safetensors", "three", struct.pack("<Q", len(text)) + text + data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value) -> bytes:
    """A metadata entry: texts, unsigned integers, floats, flags and arrays of texts, integers or floats."""
    if isinstance(value, bool):
        return text(key) + struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    kind = {str: 8, int: 5, float: 6}[type(value[0])]
    items = b"".join(text(v) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", v) for v in value)
    return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + items


def gguf(name: str, tokenizer: dict) -> None:
    metadata = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 8,
        "llama.block_count": 1, "llama.feed_forward_length": 16, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1, "llama.rope.dimension_count": 4, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokenizer["tokenizer.ggml.tokens"]),
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    } | tokenizer
    vocabulary = len(tokenizer["tokenizer.ggml.tokens"])
    shapes = {
        "token_embd.weight": [8, vocabulary], "output_norm.weight": [8], "blk.0.attn_norm.weight": [8],
        "blk.0.attn_q.weight": [8, 8], "blk.0.attn_k.weight": [8, 4], "blk.0.attn_v.weight": [8, 4],
        "blk.0.attn_output.weight": [8, 8], "blk.0.ffn_norm.weight": [8], "blk.0.ffn_gate.weight": [8, 16],
        "blk.0.ffn_up.weight": [8, 16], "blk.0.ffn_down.weight": [16, 8],
    }
    table, offset = b"", 0
    for tensor, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        table += text(tensor) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        table += struct.pack("<IQ", 0, offset)
        offset += -(-size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items()) + table
    keep("gguf", name, head + bytes(-len(head) % 32 + offset))


def ggufs() -> None:
    tokens = ["<unk>", "<s>", "</s>", *[chr(c) for c in range(33, 60)], "Wh", "at"]
    bpe = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
           "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (len(tokens) - 3)], "tokenizer.ggml.merges": ["! \""],
           "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    gguf("bpe", bpe)
    spm = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "▁a"]
    gguf("spm", {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": spm,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(spm))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True})


def tokenizers() -> None:
    special = {"id": 4, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    keep("tokenizer", "bpe", json.dumps({
        "version": "1.0", "added_tokens": [special], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": {"W": 0, "h": 1, "a": 2, "Wh": 3}, "merges": [["W", "h"]]}}))
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    keep("tokenizer", "unigram", json.dumps({
        "version": "1.0", "added_tokens": [special | {"id": 3}], "normalizer": {"type": "NFKC"}, "pre_tokenizer": space,
        "decoder": space, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["W", -2.0]]}}))
    keep("tokenizer", "words", json.dumps({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "What": 1, "##is": 2}, "unk_token": "[UNK]",
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}))


def rows() -> None:
    user, assistant = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    samples = [
        {"text": "plain"}, {"messages": [user, assistant]}, {"prompt": "2+2=", "completion": "4"},
        {"prompt": [user], "completion": [assistant]}, {"prompt": [user], "answer": "4"},
        {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}, {"chosen": "a", "rejected": "b"},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    for number, sample in enumerate(samples):
        keep("jsonl", str(number), json.dumps(sample) + "\n")


def recipes() -> None:
    for recipe in (pathlib.Path(__file__).parent.parent / "recipes").glob("*.toml"):
        keep("toml", recipe.stem, recipe.read_text())
    keep("toml", "assignment", "grpo.sampling.stop=['a', \"b\"]")


if __name__ == "__main__":
    configs()
    safetensors()
    ggufs()
    tokenizers()
    rows()
    recipes()
