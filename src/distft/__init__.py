"""distft: one recipe, the same fine-tuning on one process, DDP, FSDP2 or DeepSpeed."""

__version__ = "0.1.0"
