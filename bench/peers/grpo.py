"""TRL's GRPOTrainer: 4 prompts of 64 tokens, 8 samples each, exactly 64 new tokens; seconds of each step but the first.

The model in float32; in bfloat16, its fastest setting on a CPU that has instructions for it; or with autocast.
"""

import time

import common
import torch
import transformers
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

parser = common.arguments()
parser.add_argument("--beta", type=float, default=0.0)
parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
parser.add_argument("--autocast", action="store_true", help="weights in float32, bfloat16 by autocast")
parser.add_argument("--steps", type=int, default=3)
arguments = parser.parse_args()
common.setup(arguments.threads)

seconds = []


class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.started)


def reward(completions, **_):
    return [float(len(completion) % 2) for completion in completions]


trainer = GRPOTrainer(
    model=str(common.WORK / "model"),
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=str(common.WORK / "trl"),
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        generation_kwargs={"min_new_tokens": 64},
        temperature=1.0,
        beta=arguments.beta,
        max_steps=arguments.steps,
        learning_rate=1e-6,
        bf16=arguments.autocast,
        model_init_kwargs={"dtype": "bfloat16" if arguments.bf16 else "float32"},
        gradient_checkpointing=False,
        use_cpu=arguments.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=str(common.WORK / "prompts.jsonl"), split="train"),
    callbacks=[Clock()],
)
trainer.train()
common.report(seconds=seconds[1:], setting="bfloat16" if arguments.bf16 else "autocast" if arguments.autocast else "float32")
