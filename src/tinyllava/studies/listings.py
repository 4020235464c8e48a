"""Tables 1 and 2 beside what this package resolves them to: parts with parameters, data with amounts.

Paper: Table 1 and Table 2. Nothing is trained for them.
"""

from collections.abc import Sequence

from tinyllava.data.mixtures import MIXTURES
from tinyllava.parts.language import find_language_model
from tinyllava.parts.vision import find_vision_encoder
from tinyllava.studies.published import published_table

Rows = list[Sequence[object]]


def list_table_1() -> Rows:
    """Return the parts of Table 1: as printed, and with our path and number of parameters."""
    rows: Rows = [("part", "name", "path printed", "size printed", "path here", "parameters here")]
    for kind, name, abbreviation, path, size in published_table("table-1").rows:
        find = find_vision_encoder if kind == "Vision encoder" else find_language_model
        part = find(abbreviation)
        rows.append((kind, name, path, size, part.path, f"{part.num_parameters:,}"))
    return rows


def list_table_2() -> Rows:
    """Return the data of Table 2: as printed, and with our number of records."""
    rows: Rows = [("data set", "stage", "source", "samples printed", "records here", "without an image")]
    for dataset, stage, source, size in published_table("table-2").rows:
        mixture = MIXTURES[source]
        rows.append((dataset, stage, source, size, f"{mixture.num_samples:,}", f"{mixture.num_text_only:,}"))
    return rows


LISTINGS = {"table-1": list_table_1, "table-2": list_table_2}
"""Name that ``tinyllava reproduce`` takes -> the rows, the first one being the heads."""
