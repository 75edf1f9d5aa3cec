"""Expected token ids for SmolLM2's tokenizer, from the `tokenizers` library of Python.

The tokenizer is put together here from the vocabulary in the GGUF file and the published rules (single digits, then
GPT-2's byte-level pattern). `transformers` reads the same file without the rule for digits; both must agree on every text
without any before anything is written.

    python tests/reference/tokens.py MODEL.gguf          # writes tests/reference/tokens.json

Needs: pip install tokenizers transformers gguf
"""

import json
import sys
from pathlib import Path

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

CORPUS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces, three   spaces,      six",
    "\n\n\nlines\r\nand\ttabs\t\t\n \n  \n",
    "   \n   indented\n\tcode = {'a': [1, 2]}  # comment",
    "12345 3.14159 1,000,000 007 1e-10 ٣٤٥ ४५६ Ⅷ ½ x² 10₂",
    "I'm you're they've we'll he'd it's DON'T 'quoted' ’typographic’",
    "naïve café São Tomé Ångström Zürich",
    "na\u0308ive cafe\u0301 A\u030angstro\u0308m a\u0301\u0302\u0303\u0304\u0305",
    "안녕하세요 세계 \u1112\u1161\u11ab",
    "こんにちは、世界。漢字かな交じり文。",
    "你好，世界！我能吞下玻璃而不伤身体。",
    "Привет, мир! Ёжик",
    "שלום עולם مرحبا بالعالم \u202bRTL\u202c",
    "สวัสดีชาวโลก नमस्ते दुनिया",
    "😀😃🤣 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷🇯🇵 ❤️",
    "zero\u200bwidth\u200cjoin\u200der\ufeffbom soft\u00adhyphen nbsp\u00a0here\u3000ideographic\u2003em",
    "control \x00\x01\x02\x07\x08\x0b\x0c\x1b\x7f\x80\x85\x9f end",
    "\U0001d54f\U0001d556 \U00020000 \U0010ffff \ue000 \ufffd \ufdd0",
    "ſtraße ﬁne ﬀ İstanbul ǆ",
    "<|im_start|>user\nIgnore this<|im_end|>\n<|endoftext|>",
    "a<|im_end|>b <|im_end|> <|im_<|im_end|>end|> <|im_end",
    "<repo_name><reponame><file_sep> <jupyter_code>1+1<empty_output>",
    "</s> <s> <unk> <pad> [INST] [/INST] <0x0A> <|user|>",
    "http://example.com/a?b=c&d=%20#x user@example.org C:\\dir\\file_name.txt",
    "fn main() { println!(\"{}\", x >>= 3 && !y); } // ->=>::<>",
    "\\frac{1}{2} + \\sqrt{x^2 + y^2} \\neq \\boxed{42}",
    "camelCaseWords snake_case_words SCREAMING_CASE kebab-case",
    "............ ---------- ========== ***** !!!???",
    "a" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "  \u00a0 \u2009 mixed \u2028 separators \u2029 end",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Question: A farmer has 17 sheep and buys 25 more. How many?\nAnswer: 42",
]


def from_rules(path: str) -> Tokenizer:
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3]
    )
    return tokenizer


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = from_rules(str(path))
    other = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)

    cases = []
    for text in CORPUS:
        tokenizer.encode_special_tokens = False
        parsed = tokenizer.encode(text).ids
        assert any(map(str.isnumeric, text)) or parsed == other.encode(text, add_special_tokens=False), text
        tokenizer.encode_special_tokens = True
        ordinary = tokenizer.encode(text).ids
        assert tokenizer.decode(ordinary, skip_special_tokens=False) == text, text
        cases.append({"text": text, "ordinary": ordinary, **({"parsed": parsed} if parsed != ordinary else {})})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")


main()
