"""python -m distft.evaluation.engines.vllm_worker FD: a process in which vLLM writes answers, for `vllm_engine`.

The first line of stdin says what to load, each further one holds prompts as token ids with how they are sampled; the answers to each go to
the file descriptor FD as one line. Both are JSON. stdout is left to vLLM, which prints there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> int:
    """Entry; ends with stdin."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as replies:
        write = _load(json.loads(sys.stdin.readline()))
        replies.write("{}\n")
        replies.flush()
        for line in sys.stdin:
            replies.write(json.dumps(write(json.loads(line))) + "\n")
            replies.flush()
    return 0


def _load(wanted: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """A function from prompts to answers, in the same order."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    free, total = torch.cuda.mem_get_info()  # the model that is evaluated lies there as well
    adapter = wanted["adapter"]
    lora = {"enable_lora": True, "max_lora_rank": wanted["max_lora_rank"]} if adapter else {}
    engine = LLM(
        model=wanted["model"], revision=wanted["revision"], dtype=wanted["dtype"], trust_remote_code=wanted["trust_remote_code"],
        gpu_memory_utilization=0.9 * free / total, generation_config="vllm", **lora,
    )  # fmt: skip
    request = LoRARequest("adapter", 1, adapter) if adapter else None

    def write(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sampling = [
            SamplingParams(
                temperature=one["temperature"], top_p=one["top_p"], max_tokens=one["limit"], seed=one["seed"], stop_token_ids=one["ends"]
            )
            for one in prompts
        ]  # fmt: skip
        outputs = engine.generate(
            [{"prompt_token_ids": one["ids"]} for one in prompts], sampling, lora_request=request, use_tqdm=False
        )
        written = [output.outputs[0] for output in outputs]
        return [
            {"text": one.text, "tokens": len(one.token_ids), "finished": one.finish_reason != "length"}
            for one in written
        ]

    return write


if __name__ == "__main__":
    sys.exit(main())
