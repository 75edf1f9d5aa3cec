"""Expected logits and gradients from an independent implementation (PyTorch and transformers).

    python logits.py tiny             writes logits/<family>/{config.json, model.safetensors, expected.json}
    python logits.py smollm2 GGUF     writes logits/smollm2.json from a SmolLM2-135M-Instruct GGUF file

Needs torch, transformers, safetensors and (for GGUF) gguf. The tiny models are random, their weights rounded to bf16 so
that the files stay small and lose nothing. crates/model/tests/engine_transformers.rs compares the engine with the results.
"""

import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent / "logits"
LENGTH = 24

COMMON = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, attn_implementation="eager",
)


def tiny_models():
    t = transformers
    yield "llama", t.LlamaForCausalLM, t.LlamaConfig(**COMMON, tie_word_embeddings=True)
    yield "llama3", t.LlamaForCausalLM, t.LlamaConfig(**COMMON, tie_word_embeddings=False, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32})
    yield "mistral", t.MistralForCausalLM, t.MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=8)
    yield "qwen2", t.Qwen2ForCausalLM, t.Qwen2Config(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, tie_word_embeddings=True)
    yield "qwen3", t.Qwen3ForCausalLM, t.Qwen3Config(**COMMON | dict(head_dim=12), tie_word_embeddings=False)
    yield "gemma3", t.Gemma3ForCausalLM, t.Gemma3TextConfig(
        **COMMON | dict(head_dim=16, num_hidden_layers=3), query_pre_attn_scalar=20, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def write_tiny(name, model_class, config):
    torch.manual_seed(sum(name.encode()))
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Large enough for every part to matter; norms and biases are random too.
            deviation = 0.3 if parameter.dim() == 1 else 1.5 / math.sqrt(parameter.shape[-1])
            mean = 1.0 if "norm" in parameter_name and "gemma" not in name else 0.0
            values = torch.randn_like(parameter) * deviation + mean
            parameter.copy_(values.to(torch.bfloat16).float())
    ids = torch.randint(3, config.vocab_size, (1, LENGTH))
    logits = model(ids, use_cache=False).logits[0]
    log_probs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    (-log_probs.mean()).backward()
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    parameters = dict(model.named_parameters())
    save_file({k: v.detach().to(torch.bfloat16) for k, v in parameters.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "expected.json").write_text(json.dumps({
        "transformers": transformers.__version__,
        "ids": ids[0].tolist(),
        "logits": [[float(f"{x:.7g}") for x in row] for row in logits.tolist()],
        "gradient_norms": {k: float(f"{v.grad.norm().item():.7g}") for k, v in parameters.items()},
    }) + "\n")
    print(name, sum(p.numel() for p in parameters.values()), "weights, loss", -log_probs.mean().item())


PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
]


def write_smollm2(path):
    path = Path(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = []
    for text in PROMPTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        log_probs = logits.log_softmax(-1)
        top = logits[-1].topk(10)
        prompts.append({
            "text": text,
            "ids": ids,
            "log_probs": [round(log_probs[i, ids[i + 1]].item(), 6) for i in range(len(ids) - 1)],
            "top_ids": top.indices.tolist(),
            "top_logits": [round(x, 5) for x in top.values.tolist()],
        })
        print(repr(text), tokenizer.convert_ids_to_tokens(top.indices.tolist())[:3])
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / "smollm2.json").write_text(json.dumps(
        {"transformers": transformers.__version__, "file": path.name, "prompts": prompts}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["tiny"]:
        for model in tiny_models():
            write_tiny(*model)
    elif len(sys.argv) == 3 and sys.argv[1] == "smollm2":
        write_smollm2(sys.argv[2])
    else:
        sys.exit(__doc__)
