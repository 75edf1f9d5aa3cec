"""llama.cpp, from the prebuilt wheel `xllamacpp`: one sequence, a prompt of 64 tokens, 128 sampled tokens, Q8_0 weights."""

import json
import platform
import resource

import common_gguf
import xllamacpp

arguments = common_gguf.arguments().parse_args()
params = xllamacpp.CommonParams()
params.model.path = str(common_gguf.FILE)
params.n_ctx = 512
params.n_parallel = 1
params.cpuparams.n_threads = arguments.threads
params.cpuparams_batch.n_threads = arguments.threads
server = xllamacpp.Server(params)

rates = []
for repeat in range(arguments.repeats + 1):
    answer = server.handle_completions(
        {
            "prompt": [(repeat * 64 + i) % 40000 + 100 for i in range(64)],
            "n_predict": 128,
            "ignore_eos": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "cache_prompt": False,
        }
    )
    if repeat > 0:
        assert answer["timings"]["predicted_n"] == 128, answer["timings"]
        rates.append(answer["timings"]["predicted_per_second"])
weight_bytes = common_gguf.weight_bytes()
print(
    json.dumps(
        {
            "tokens_per_second": rates,
            "weight_bytes_per_second": [rate * weight_bytes for rate in rates],
            "weight_bytes": [weight_bytes],
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "setting": "Q8_0",
            "versions": {"python": platform.python_version(), "xllamacpp": xllamacpp.__version__},
        }
    )
)
