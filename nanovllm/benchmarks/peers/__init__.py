"""Engines that ``nanovllm bench --compare`` runs, one a module, each in a process and a virtual environment of its own.

A module here needs the standard library and its engine only: nanovllm is not installed in the others' environments,
where ``launch.py`` starts them.
"""
