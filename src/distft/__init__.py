"""distft: one recipe, the same fine-tuning on one process, DDP, FSDP2 or DeepSpeed."""

import logging
import os
import warnings

__version__ = "0.1.0"

if not os.environ.get("DISTFT_DEBUG"):
    # Notices of the installed versions that ask nothing of a user. Here, because they come while libraries are imported.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    for message in (
        r".*gradient_checkpointing. is deprecated",  # TRL still sets the old name
        r".*`torch.distributed..*_tensor. is deprecated",  # DeepSpeed still calls the old name
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
