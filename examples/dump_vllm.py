"""Dumps the log-probabilities that vLLM's offline engine gives over a text, for `gklx score`.

    python examples/dump_vllm.py org/model text.txt original
    python examples/dump_vllm.py org/model-awq text.txt awq
    gklx score awq-logits.npy original-logits.npy --targets original-targets.npy

Writes NAME-logits.npy [samples, classes] in float32 and NAME-targets.npy. The engine hands over Python dictionaries of
the whole vocabulary: some thousand samples take minutes. A few texts are enough; the report has the standard errors.
"""

import sys

import numpy as np
from vllm import LLM, SamplingParams


def main(model_name: str, text_path: str, name: str, window: int = 512) -> None:
    """Each window of tokens is a prompt; each token but its last is a sample, the next one its target."""
    engine = LLM(model=model_name, max_model_len=window + 1, max_logprobs=-1, logprobs_mode="raw_logprobs")
    with open(text_path, encoding="utf-8") as file:
        ids = engine.get_tokenizer().encode(file.read())
    prompts = [ids[at : at + window] for at in range(0, len(ids) - 1, window) if len(ids) - at > 1]
    np.save(f"{name}-targets.npy", np.concatenate([np.asarray(x[1:]) for x in prompts]))
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1)  # of all classes
    samples, at, file = sum(len(x) - 1 for x in prompts), 0, None
    for prompt in prompts:
        (output,) = engine.generate([{"prompt_token_ids": prompt}], asked)
        for of_token in output.prompt_logprobs[1:]:  # nothing comes before the first
            if file is None:
                file = np.lib.format.open_memmap(f"{name}-logits.npy", "w+", np.float32, (samples, len(of_token)))
            classes = np.fromiter(of_token.keys(), np.int64, len(of_token))
            file[at, classes] = np.fromiter((x.logprob for x in of_token.values()), np.float32, len(of_token))
            at += 1
    print(f"{name}-logits.npy: {samples:,} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
