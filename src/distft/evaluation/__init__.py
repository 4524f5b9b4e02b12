"""What the fine-tune changed: base and adapter side by side, as `distft evaluate` measures them.

A task is a module here, named as the recipe names it, with `run(target, settings, folder) -> dict`. All ranks enter it, and all get
the result, which JSON can hold. What `result["figures"]` names (see `figures.compared`) reaches the report; everything else stands in
`evaluation.json`. Raw outputs are JSON lines under `folder`, the task's own.
"""
