"""A run's configuration: what its keys are, and how they are read, checked and written.

Start with `schema.py` (a whole run) and `loading.py` (`load_config`, `dump_config`).

    section.py    the base of every section: no unknown key, no key that does nothing
    schema.py, leash.py, algorithm.py    the sections, with every default
    sources.py    YAML with line numbers;  faults.py    messages that name them
    keys.py       which names there are;   inputs.py    where relative paths are sought
    changes.py    what differs between two configurations, and what a run may resume with

May import `algorithms` and `kl` for their names and checks; loads no model and no data.
"""
