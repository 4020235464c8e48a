"""Get the log-probabilities of llama.cpp's whole vocabulary, in a separate process.

llama.cpp ends its process if it cannot open a file, and the exporting process must survive that. Run this
file as a script with a JSON request on standard input: {model, mmproj, output, num_threads, context,
num_rows, next_token, questions}. Each question is a text or a list of chat messages. The script writes one
list of log-probabilities per question to ``output``.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer the request on standard input."""
    import xllamacpp as llama

    request = json.load(sys.stdin)
    settings = llama.CommonParams()
    settings.model.path = request["model"]
    settings.mmproj.path = request["mmproj"]
    settings.mmproj_use_gpu, settings.n_gpu_layers = False, 0
    settings.n_ctx = settings.n_batch = settings.n_ubatch = request["context"]
    settings.n_parallel, settings.cache_ram_mib = 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["num_threads"]
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = settings.fit_params = settings.ui = False
    settings.use_jinja = True
    server = llama.Server(settings)
    answers = [_ask(server, question, request) for question in request["questions"]]
    Path(request["output"]).write_text(json.dumps(answers), encoding="utf-8")


def _ask(server: Any, question: Any, request: dict[str, Any]) -> list[float]:
    num_rows: int = request["num_rows"]
    # No log-probabilities come with an answer that ends at once. What is listed is taken before the bias.
    forced = [[request["next_token"], 1000.0]]
    options = {"max_tokens": 1, "temperature": 0.0, "cache_prompt": False, "logit_bias": forced}
    if isinstance(question, str):
        answer = server.handle_completions({"prompt": question, "logprobs": num_rows, **options})
    else:
        body = {"messages": question, "logprobs": True, "top_logprobs": num_rows, **options}
        answer = server.handle_chat_completions(body)
    listed = answer["choices"][0]["logprobs"]["content"] if "choices" in answer else None
    if not isinstance(listed, list):
        raise SystemExit(f"llama.cpp answers: {answer}")
    found = {entry["id"]: entry["logprob"] for entry in listed[0]["top_logprobs"]}
    return [found[number] for number in range(num_rows)]


if __name__ == "__main__":
    main()
