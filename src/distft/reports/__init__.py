"""Reports on runs, as Markdown, JSON, a page or a W&B run.

- `results`, `history`: read what runs left behind, and the logs of other programs
- `variants`, `comparability`, `comparison`: which runs are repeats, what was equal, and which differences are real
- `bottleneck`: what limits the speed of a step
- `verdict`: the wording of every verdict
- `report`: all of it for a set of runs
- `sections`, `facts`, `tables`: how a report is laid out, as typed tables and lines
- `markdown`, `html`, `charts`, `drawing`, `evaluation_charts`, `wandb`: how it is rendered
"""
