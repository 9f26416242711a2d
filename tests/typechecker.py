"""The checker of annotations in tests: beartype, where an int passes for a float as PEP 484 says."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
