"""Stand-ins for other projects' modules: our own code, with their class names, parameters, shapes and arguments.

One file a project, or a family of them whose modules compute the same. What they compute is written from the published
algorithms. That the projects' own classes are recognised and agree is shown by benchmarks/accelerate_cpu.py.
"""
