#!/usr/bin/env bash
# GPT-2 on a Cloud TPU slice: create it, copy this checkout to its hosts, and train.
#
#   ZONE=us-east5-a examples/gpt/launch/tpu.sh gpt v5p-64 \
#     --preset gpt2-1.5b --mesh auto --data gs://my-bucket/openwebtext --out gs://my-bucket/runs/gpt
#
# If the pod was preempted, the same command creates it again, and the run resumes. To
# delete it:
#   gcloud compute tpus tpu-vm delete gpt --zone "$ZONE"
set -euo pipefail
name=$1 type=$2
shift 2
at=("$name" --zone "${ZONE:?a zone}")

state=$(gcloud compute tpus tpu-vm describe "${at[@]}" --format 'value(state)' 2>/dev/null || true)
case "$state" in # a preempted pod still has its name
  PREEMPTED | TERMINATED | STOPPED) gcloud compute tpus tpu-vm delete "${at[@]}" --quiet && state="" ;;
esac
[ -n "$state" ] ||
  gcloud compute tpus tpu-vm create "${at[@]}" --accelerator-type "$type" \
    --version "${VERSION:-v2-alpha-tpuv5}"
on_each_host() { gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all --command "$1"; }

git archive --format tar.gz -o /tmp/sophia_optax.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/sophia_optax.tar.gz "${at[@]:0:1}:" "${at[@]:1}" --worker=all
on_each_host "set -e
  mkdir -p sophia_optax && tar xzf sophia_optax.tar.gz -C sophia_optax
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv -q --allow-existing --python 3.12 env
  ~/.local/bin/uv pip install -q --python env/bin/python -e 'sophia_optax[examples,data,gcs]' 'jax[tpu]'"
# Every host runs the same command, and the processes find each other.
on_each_host "cd sophia_optax && ../env/bin/python -m examples.gpt $(printf '%q ' "$@")"
