"""TRL's SFTTrainer from start to the trained model on disk: ten steps of 8 rows of 256 tokens."""

import time

import common
import transformers
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

parser = common.arguments()
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast, its default")
arguments = parser.parse_args()
common.setup(arguments.threads)

first_step_at = None


class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
        global first_step_at
        first_step_at = first_step_at or time.time()


trainer = SFTTrainer(
    model=str(common.WORK / "model"),
    args=SFTConfig(
        output_dir=str(common.WORK / "trl"),
        per_device_train_batch_size=8,
        max_length=256,
        max_steps=arguments.steps,
        learning_rate=1e-5,
        bf16=arguments.autocast,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_cpu=arguments.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=str(common.WORK / "texts.jsonl"), split="train"),
    callbacks=[Clock()],
)
trainer.train()
trainer.save_model()
common.report(first_step_at=first_step_at, setting="autocast" if arguments.autocast else "float32")
