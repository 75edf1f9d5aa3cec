"""transformers' `generate`: 16 prompts of 64 tokens, 128 sampled tokens each, temperature 1."""


import torch

import common

SEQUENCES, PROMPT, NEW = 16, 64, 128


def main():
    arguments = common.arguments()
    arguments.add_argument("--bf16", action="store_true")
    arguments = arguments.parse_args()
    common.setup(arguments.threads)

    model = common.model(torch.bfloat16 if arguments.bf16 else torch.float32, arguments.device).eval()
    ids = torch.randint(0, common.SHAPE["vocab_size"], (SEQUENCES, PROMPT), device=arguments.device)

    @torch.inference_mode()
    def generate():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=2,
        )

    common.report(tokens_per_second=common.measure(generate, SEQUENCES * NEW, arguments.repeats))


if __name__ == "__main__":
    main()
