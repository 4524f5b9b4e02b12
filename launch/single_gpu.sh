#!/usr/bin/env bash
# Train with one process on one GPU, or on the CPU if there is none: launch/single_gpu.sh recipe=ddp_qlora lora.r=8
# Set CUDA_VISIBLE_DEVICES to choose a GPU other than the first.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec python -m distft.train "$@"
