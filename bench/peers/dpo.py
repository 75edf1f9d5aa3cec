"""TRL's DPOTrainer from start to the trained model on disk: ten steps of 4 pairs, prompts of 128 tokens and completions of 128."""

import common
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

parser = common.arguments()
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast, its default")
arguments = parser.parse_args()
common.setup(arguments.threads)

trainer = DPOTrainer(
    model=str(common.WORK / "model"),
    args=DPOConfig(
        output_dir=str(common.WORK / "trl"),
        per_device_train_batch_size=4,
        max_length=256,
        max_steps=arguments.steps,
        learning_rate=1e-6,
        bf16=arguments.autocast,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_cpu=arguments.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=str(common.WORK / "pairs.jsonl"), split="train"),
)
trainer.train()
trainer.save_model()
common.report(setting="autocast" if arguments.autocast else "float32")
