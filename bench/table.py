"""Makes docs/performance.md and docs/growth.svg from bench/results/*.json and bench/notes.md.

    python3 bench/table.py
"""

import json
import math
import pathlib

BENCH = pathlib.Path(__file__).resolve().parent
RESULTS, DOCS = BENCH / "results", BENCH.parent / "docs"
CASES = {
    "full-f32": ("full fine-tuning step, f32", "PyTorch float32"),
    "full-bf16": ("full fine-tuning step, bf16", "PyTorch autocast"),
    "lora-bf16": ("LoRA step (r = 16), bf16", "PyTorch autocast"),
    "generate-f32": ("generate 16 x 128 tokens, f32", "transformers float32"),
    "generate-bf16": ("generate 16 x 128 tokens, bf16", "transformers bfloat16"),
    "grpo": ("GRPO step, 4 x 8 x 64 tokens, bf16", "TRL bfloat16"),
    "grpo-reference": ("GRPO step with a reference model, bf16", "TRL bfloat16"),
    "sft-e2e": ("SFT of ten steps, start to model on disk, bf16", "TRL autocast"),
    "dpo-e2e": ("DPO of ten steps, start to model on disk, bf16", "TRL autocast"),
    "start": ("start to first training step", "TRL"),
    "generate-e2e": ("generate 16 x 64 tokens, start-up included, bf16", "transformers bfloat16"),
    "decode-1-q8": ("decode 1 sequence, weights read", "llama.cpp Q8_0, ours bf16"),
    "decode-1-candle": ("decode 1 sequence, weights read", "candle Q8_0, ours bf16"),
}


def load(name, folder=""):
    path = RESULTS / folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def amount(value, unit):
    if unit == "tokens_per_second":
        return f"{value:.0f} tok/s"
    if unit == "weight_bytes_per_second":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def gib(count):
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def mark(reached):
    return "" if reached else " ✗"


# ---- Sections ----


def comparisons(results, precision=None):
    """The table of both sides; with a precision, the one in which peers computed instead of the case's own."""
    yield "| work | posttrain | peer | times as fast | target | peak memory | of the peer's | target |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, result in results.items():
        work, peer = CASES[name]
        peer = f"{peer.split()[0]} {precision}" if precision else peer
        unit, targets = result["unit"], result["targets"]
        ours, theirs = result["ours"], result["peer"]
        speed, speed_target = result["speed_ratio"], targets["speed_ratio_at_least"]
        cells = [
            work,
            amount(ours[unit]["median"], unit),
            f"{amount(theirs[unit]['median'], unit)} ({peer})",
            f"**{speed:.2f}**{mark(speed >= speed_target)}",
            f"{speed_target:g}",
        ]
        memory, memory_target = result["memory_ratio"], targets["memory_ratio_at_most"]
        cells += [gib(ours["peak_memory_bytes"]), f"{memory:.2f}{mark(not memory_target or memory <= memory_target)}"] if memory else ["", ""]
        cells += [f"{memory_target:g}" if memory_target else ""]
        yield f"| {' | '.join(cells)} |"


def roofline(result):
    machine = result["machine"]
    yield (
        f"{result['threads']} threads, {result['kernels']}: {machine['f32_peak'] / 1e9:.0f} GFLOP/s in f32 and {machine['bf16_peak'] / 1e9:.0f} in bf16, "
        f"{machine['read_bandwidth'] / 1e9:.0f} GB/s read and {machine['update_bandwidth'] / 1e9:.0f} GB/s changed in place."
    )
    yield ""
    yield "| phase | time | operations | bytes | bound by | of its bound | in products | in attention | rate in products |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for phase in result["training"] + result["generation"]:
        operations = phase["product_operations"] + phase["attention_operations"]
        moved = phase["bytes"]["read"] + phase["bytes"]["written"]
        cells = [
            phase["name"],
            f"{phase['seconds'] * 1e3:.0f} ms",
            f"{operations / 1e9:.{0 if operations >= 1e11 else 1}f} GFLOP" if operations else "",
            f"{moved / 1e9:.2f} GB",
            phase["limit"],
            f"{100 * phase['bound_seconds'] / phase['seconds']:.0f} %",
            f"{100 * phase['product_seconds'] / phase['seconds']:.0f} %" if phase["product_operations"] else "",
            f"{100 * phase['attention_seconds'] / phase['seconds']:.0f} %" if phase["attention_operations"] else "",
            f"{phase['product_operations'] / phase['product_seconds'] / 1e9:.0f} GFLOP/s" if phase["product_operations"] else "",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| | measured | target |"
    yield "| --- | --- | --- |"
    for name, what in (
        ("products_of_peak", "rate inside products, of the matrix peak"),
        ("products_of_step", "products, of the training step"),
        ("decode_of_bound", "decode, of its bound"),
    ):
        reached, target = result[name], result["targets"][name]
        yield f"| {what} | **{100 * reached:.0f} %**{mark(reached >= target)} | {100 * target:.0f} % |"


def growth(result):
    for axis in result["axes"].values():
        heads = [str(point["value"]) for point in axis["points"]]
        yield f"**{axis['varied'].capitalize()}** ({axis['unit']}; {'training step' if axis['task'] == 'train' else 'decoding'}, {axis['shape']}):"
        yield ""
        yield f"| | {' | '.join(heads)} |"
        yield f"| --- |{' --- |' * len(heads)}"
        rates = [f"{point['tokens_per_second']:.0f}" for point in axis["points"]]
        yield f"| tokens/s | {' | '.join(rates)} |"
        yield f"| peak memory | {' | '.join(gib(point['peak_memory_bytes']) for point in axis['points'])} |"
        yield ""


# ---- The plot ----

STYLE = """svg{--ink:#1a1d21;--soft:#5f6770;--line:#e3e6ea;--accent:#0f6fde;--other:#b35a00;--paper:#ffffff}
@media(prefers-color-scheme:dark){svg{--ink:#e6e9ec;--soft:#98a1ab;--line:#2b3036;--accent:#5aa5ff;--other:#f0a35e;--paper:#0d1117}}
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:11px;fill:var(--soft)}
.name{font-size:13px;font-weight:600;fill:var(--ink)}.grid{stroke:var(--line)}
.rate{stroke:var(--accent);fill:none;stroke-width:2;stroke-linejoin:round}.memory{stroke:var(--other);fill:none;stroke-width:2;stroke-linejoin:round}
circle.rate{fill:var(--accent);stroke:none}circle.memory{fill:var(--other);stroke:none}.paper{fill:var(--paper)}"""


def short(value):
    if isinstance(value, str):
        return value
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value / 1000:.0f}k" if value >= 10000 else str(value)


def nice(largest):
    """A round number at or above the largest value."""
    power = 10 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest)


def curve(kind, values, names, top, height, unit, left, width):
    limit = nice(max(values))
    x = lambda i: left + (width * (i + 0.5) / len(values))
    y = lambda value: top + height * (1 - value / limit)
    parts = []
    for share in (0, 0.5, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y(share * limit):.1f}" y2="{y(share * limit):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(share * limit) + 4:.1f}" text-anchor="end">{share * limit:g}</text>')
    points = [(x(i), y(value)) for i, value in enumerate(values)]
    parts.append(f'<polyline class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    for (a, b), name, value in zip(points, names, values):
        parts.append(f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{name}: {value:.4g} {unit}</title></circle>')
    return parts, x


def plot(result):
    columns, cell_width, cell_height = 2, 460, 250
    axes = list(result["axes"].values())
    rows = math.ceil(len(axes) / columns)
    width, height = columns * cell_width, rows * cell_height + 30
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="growth of cost">']
    parts.append(f'<style>{STYLE}</style><rect class="paper" width="{width}" height="{height}" rx="6"/>')
    parts.append('<circle class="rate" cx="24" cy="18" r="4"/><text x="34" y="22">tokens/s</text>')
    parts.append('<circle class="memory" cx="104" cy="18" r="4"/><text x="114" y="22">peak memory, GiB</text>')
    for index, axis in enumerate(axes):
        left, top = index % columns * cell_width + 62, index // columns * cell_height + 40
        span = cell_width - 90
        title = axis["varied"].capitalize() + (", training step" if axis["task"] == "train" else ", decoding" if "decod" not in axis["varied"] else "")
        parts.append(f'<text class="name" x="{left}" y="{top + 4}">{title}</text><text x="{left + span}" y="{top + 4}" text-anchor="end">{axis["shape"]}</text>')
        names = [short(point["value"]) for point in axis["points"]]
        drawn, x = curve("rate", [point["tokens_per_second"] for point in axis["points"]], names, top + 20, 96, "tokens/s", left, span)
        parts += drawn
        drawn, _ = curve("memory", [point["peak_memory_bytes"] / 2**30 for point in axis["points"]], names, top + 134, 44, "GiB", left, span)
        parts += drawn
        parts += [f'<text x="{x(i):.1f}" y="{top + 194}" text-anchor="middle">{name}</text>' for i, name in enumerate(names)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    results = {name: result for name in CASES if (result := load(name))}
    first = next(iter(results.values()))
    machine = first["machine"]
    versions = {}
    for result in results.values():
        versions |= {name: number for name, number in result["peer"]["versions"].items() if name != "python"}
    lines = [
        "# Performance",
        "",
        "Made by `bench/table.py` from `bench/results/*.json` and `bench/notes.md`; [the work of each case](../bench/README.md). Both sides ran alternately, each",
        f"measurement in a fresh process, on one machine: {machine['cores']} cores of an {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB. "
        + f"Peers: {', '.join(f'{name} {number}' for name, number in sorted(versions.items()))}.",
        "Figures are medians; they swing with the machine, ratios less so. ✗ marks a target that is missed.",
        "",
        "## Beside the peers",
        "",
        *comparisons(results),
        "",
    ]
    notes = (BENCH / "notes.md").read_text().split("\n## ")
    notes = {note.split("\n", 1)[0]: note.split("\n", 1)[1].strip() for note in notes[1:]}
    lines += [notes["Peers"], ""]
    if found := load("roofline"):
        lines += ["## Against the machine", "", notes["Machine"], "", *roofline(found), ""]
    if found := load("growth"):
        lines += ["## Growth", "", notes["Growth"], "", "![tokens per second and memory against sizes](growth.svg)", "", *growth(found)]
        (DOCS / "growth.svg").write_text(plot(found))
    if found := load("determinism"):
        lines += ["## The price of determinism", "", notes["Determinism"], "", "| what | fixed order | free order | price |", "| --- | --- | --- | --- |"]
        lines += [f"| {row['what']} | {row['fixed']} | {row['free']} | {row['price']} |" for row in found["rows"]] + [""]
    lines += ["## Processors", "", notes["Processors"], ""]
    if found := {name: result for name in CASES if (result := load(name, "float32"))}:
        lines += ["## Without instructions for bfloat16", "", notes["Float32"], "", *comparisons(found, "float32"), ""]
        if machine := load("roofline", "float32"):
            lines += [*roofline(machine)]
    (DOCS / "performance.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
