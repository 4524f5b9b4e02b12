#!/usr/bin/env bash
# Train on every visible GPU of this machine: launch/all_gpus.sh recipe=fsdp_bf16 training.learning_rate=2e-4
exec accelerate launch -m distft.train "$@"
