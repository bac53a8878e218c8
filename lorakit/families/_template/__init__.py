"""An example family to copy. It is not registered; `tests/families/test_template.py` trains a copy of it.

To add a family: copy this folder to `families/<name>/`, change the parts that the comments of `spec.py` and `model.py`
name, and add one entry to `registry.FAMILIES`. Another package declares `<name> = "<package>.spec:SPEC"` as an entry
point of the group `lorakit.families` instead.
"""
