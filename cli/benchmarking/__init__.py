"""What `foldkernels bench` is made of, and what the repository's own benchmarks measure with.

`timing`, `memory`, `processes` and `hardware` measure. `subjects` and `models` are what is measured, in the process of
`worker`, which `workers` starts; `plan` says what, and `running` does it. `rows` are the results, `figures`, `fits` and
`series` numbers made of them. `summary`, `plots`, `drawing` and `report` tell; `comparison` sets two files side by
side.
"""
