#!/bin/sh
# Dump the log-probabilities of GGUF models on a text by llama.cpp's own tool, and score all models against the last.
#
#     examples/dump_llama_cpp.sh text.txt model-q8_0.gguf model-q4_0.gguf model-f16.gguf
#
# LLAMA_PERPLEXITY names the tool (default: llama-perplexity), GKLX the command (default: gklx).
set -eu
text=$1
shift
dumps=
for model in "$@"; do
    dump=$(basename "$model" .gguf).kld
    "${LLAMA_PERPLEXITY:-llama-perplexity}" -m "$model" -f "$text" --kl-divergence-base "$dump"
    dumps="$dumps $dump"
done
# The dumps are in the working folder. The unquoted list does not allow spaces in the models' names.
# shellcheck disable=SC2086
exec ${GKLX:-gklx} score $dumps --loss kl,reverse_kl --top-k 5,10
