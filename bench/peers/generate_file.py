"""A script that answers a file of prompts with transformers: 16 prompts of 64 tokens, 64 sampled tokens each."""

import json

import common
import torch
import transformers

parser = common.arguments()
parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
arguments = parser.parse_args()
common.setup(arguments.threads)

folder = common.WORK / "random"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if arguments.bf16 else torch.float32).to(arguments.device).eval()
prompts = [json.loads(line)["prompt"] for line in (common.WORK / "prompts16.jsonl").read_text().splitlines()]
batch = tokenizer(prompts, return_tensors="pt").to(arguments.device)
with torch.inference_mode():
    output = model.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=64, max_new_tokens=64, pad_token_id=2
    )
answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
(common.WORK / "answers.jsonl").write_text("".join(json.dumps({"completion": answer}) + "\n" for answer in answers))
common.report(setting="bfloat16" if arguments.bf16 else "float32")
