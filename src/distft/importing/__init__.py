"""`distft import`: a configuration of another program becomes a recipe, and a table of what each of its keys became.

`reading` loads the file and finds out whose it is. A module for each program (`axolotl`, `llama_factory`, `trl`,
`unsloth`) holds its keys as tables, and what tables cannot say as a function. `translation` has what the programs
share, `draft` the recipe and the table in the making, `writing` the file, and `explain` a row as both train on it.
"""
