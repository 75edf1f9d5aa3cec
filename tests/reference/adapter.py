"""A LoRA adapter as PEFT writes it, and what PEFT makes of one that posttrain wrote.

    python tests/reference/adapter.py write              # writes tests/reference/adapter from logits/llama
    python tests/reference/adapter.py check BASE ADAPTER # a folder posttrain wrote: PEFT loads it, key for key

Needs torch, transformers, safetensors and peft. crates/model/tests/adapter.rs compares the engine with the files of `write`.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
IDS = list(range(3, 27))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0]


def write():
    torch.manual_seed(7)
    base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "logits/llama", dtype=torch.float32).eval()
    plain = logits(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, task_type="CAUSAL_LM", target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # B is zero in a fresh adapter; values that bf16 holds keep the file small.
                parameter.copy_((torch.randn_like(parameter) * 0.2).to(torch.bfloat16).float())
    changed = logits(model)
    folder = HERE / "adapter"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "llama", "target_modules": sorted(settings["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    (folder / "expected.json").write_text(json.dumps({
        "peft": peft.__version__,
        "ids": IDS,
        "logits": [[float(f"{x:.7g}") for x in row] for row in changed.tolist()],
    }) + "\n")
    print("the adapter moves logits by up to", (changed - plain).abs().max().item())


def check(base, adapter):
    saved = {k: v.float() for k, v in load_file(Path(adapter) / "adapter_model.safetensors").items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    loaded = peft.get_peft_model_state_dict(model)
    assert saved.keys() == loaded.keys(), saved.keys() ^ loaded.keys()
    assert all(torch.equal(saved[key], loaded[key].float()) for key in saved)
    with_adapter = logits(model)
    with model.disable_adapter():
        print("the adapter moves logits by up to", (with_adapter - logits(model)).abs().max().item())
    # W + s·BA by hand, from the names alone.
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            key = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
            if key.format("A") in saved:
                parameter += scale * saved[key.format("B")] @ saved[key.format("A")]
    print("distance to the merged weights:", (with_adapter - logits(merged)).abs().max().item())


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif len(sys.argv) == 4 and sys.argv[1] == "check":
        check(*sys.argv[2:])
    else:
        sys.exit(__doc__)
