#!/usr/bin/env bash
# One process on one GPU, or on the CPU where there is none: launch/single_gpu.sh recipe=ddp_qlora lora.r=8
# CUDA_VISIBLE_DEVICES chooses another GPU than the first.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec python -m distft.train "$@"
