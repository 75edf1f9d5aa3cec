"""Makes what the comparisons share in the folder named by its argument, beside `model/`:

random/        SmolLM2-135M's shape with random weights and the model's tokenizer; it never ends an answer early
texts.jsonl    80 rows of text, each longer than 256 tokens
prompts.jsonl  64 prompts of exactly 64 tokens; prompts16.jsonl its first sixteen
q8_0.gguf      `model/` with every matrix in Q8_0, as llama.cpp's own converter lays it out
"""

import json
import pathlib
import random
import shutil
import sys

import gguf
import numpy
import torch
import transformers

import common

work = pathlib.Path(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(work / "model")


def write_random():
    model = common.model()
    model.save_pretrained(work / "random")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (work / "model" / name).exists():
            shutil.copy(work / "model" / name, work / "random" / name)


def write_rows():
    draw = random.Random(0)
    words = [word for word in common.WORDS if len(tokenizer.encode(" " + word)) == 1]
    text = lambda count: "".join(" " + draw.choice(words) for _ in range(count))
    texts, prompts = [text(300) for _ in range(80)], [text(64) for _ in range(64)]
    assert all(len(tokenizer.encode(row)) == 300 for row in texts) and all(len(tokenizer.encode(row)) == 64 for row in prompts)
    # Completions with the end of a sequence in place of their last token, so that both sides count 128.
    pairs = [dict(prompt=text(128), chosen=text(127), rejected=text(127)) for _ in range(40)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lines = lambda key, rows: "".join(json.dumps({key: row}) + "\n" for row in rows)
    (work / "texts.jsonl").write_text(lines("text", texts))
    (work / "prompts.jsonl").write_text(lines("prompt", prompts))
    (work / "prompts16.jsonl").write_text(lines("prompt", prompts[:16]))


def write_gguf():
    config = transformers.AutoConfig.from_pretrained(work / "model")
    weights = transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).state_dict()
    writer = gguf.GGUFWriter(work / "q8_0.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(common.SHAPE["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    pieces = json.loads((work / "model/tokenizer.json").read_text())["model"]
    tokens = sorted(pieces["vocab"], key=pieces["vocab"].get)
    special = set(tokenizer.all_special_ids)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in pieces["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        for module, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if module in name:
                # llama.cpp rotates neighbouring elements, Hugging Face those half a head apart.
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = numpy.ascontiguousarray(data, dtype=numpy.float32)
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write_random()
write_rows()
write_gguf()
