"""`distft export`: hand a run's result over to other programs, with a proof that it answers as in training."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.cli.arguments import Commands
from distft.console import say
from distft.errors import LaunchError, RunFolderError

_FORMS = ("adapter", "merged", "gguf", "ollama", "vllm")
_WHEN_LOADED = {
    "nf4": "vLLM and transformers quantise merged weights while they load them (bitsandbytes); export --to merged",
    "fp8": "vLLM quantises merged weights while it loads them (vllm serve --quantization fp8); export --to merged",
    "awq": "distft does not calibrate; export --to merged, and run llm-compressor or AutoAWQ on it",
}
_QUANTISED = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's result for other programs, and prove that it answers as in training",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  distft export runs/tiny --to merged\n  distft export runs/tiny --to gguf --quantize q8_0",
    )
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--to", choices=_FORMS, required=True, help="what to write")
    parser.add_argument("--quantize", metavar="TYPE", help=f"for gguf and ollama: {', '.join(_QUANTISED)}")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export/FORM)")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="held-out rows to replay (32)")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="what quantising may cost per token")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hugging Face Hub, privately")
    parser.add_argument("--public", action="store_true", help="with --push: a repository that all can read")
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise RunFolderError(f"run folder {options.folder} does not exist")
    if options.rows < 1:
        raise LaunchError(f"--rows is {options.rows}; the proof needs at least one row")
    if options.quantize in _WHEN_LOADED:
        raise LaunchError(f"--quantize {options.quantize}: {_WHEN_LOADED[options.quantize]}")
    if options.quantize is not None and options.to not in ("gguf", "ollama"):
        raise LaunchError("--quantize is for --to gguf and ollama; other forms keep the precision of the training")
    if options.quantize is not None and options.quantize not in _QUANTISED:
        raise LaunchError(f"--quantize {options.quantize} is not one of {', '.join(_QUANTISED)}")
    if options.public and options.push is None:
        raise LaunchError("--public says how to --push; name the repository")
    from distft.export.run import Wish, export
    from distft.runs.folder import RunFolder

    wish = Wish(options.to, options.quantize, options.rows, options.max_kl)
    run = RunFolder(options.folder)
    output = options.output or run.export / wish.name
    proof = export(run, wish, output)
    if proof is None:
        print(f"{output}: a plain copy, which needs no proof")
        return _push(options, output)
    print(f"{output}: {proof.rows} rows of the split {proof.split} in {proof.engine}")
    print("\n".join(proof.lines()))
    if (broken := proof.broken) is None:
        return _push(options, output)
    say(f"the proof failed at the stage {broken.name}: {broken.found}")
    if options.push is not None:
        say(f"{options.push} was not written")
    return 1


def _push(options: argparse.Namespace, output: Path) -> int:
    if options.push is not None:
        from distft.export.push import push

        print(f"pushed: {push(output, options.push, private=not options.public)}")
    return 0
