"""Hold out records by their images, so that no image is in both training and held-out data.

Paper: none. Questions about an image of the training data would measure memorisation.
"""

import hashlib
from collections.abc import Mapping, Sequence

from tinyllava.conversation import Conversation, ImageRef
from tinyllava.data.hashes import records_digest
from tinyllava.errors import DataError


def hold_out(
    conversations: Sequence[Conversation], hashes: Mapping[ImageRef, str], share: float
) -> list[int]:
    """Choose the held-out records: about a share of them, by the content of their images.

    Records that share an image, directly or through others, stay together; records without an image stay
    together when they say the same. The choice follows from the contents alone: neither order, names, folders
    nor a seed change it, and most of it stays when records are added.

    Args:
        hashes: digest of the content of each image.
        share: between 0 and 1.

    Returns:
        Their indices in ascending order: at most the share where the groups allow it, at least one group.

    Raises:
        DataError: all records are one group.
    """
    groups = sorted(_group(conversations, hashes), key=lambda group: group[0])
    if len(groups) < 2:
        raise DataError(
            f"{conversations[0].source if conversations else 'no records'}: all records are connected by "
            "shared images, so none can be held out. Give a record file: --held-out FILE."
        )
    wanted = max(1, round(share * len(conversations)))
    taken: list[int] = []
    for _, members in groups:
        if len(taken) + len(members) <= wanted:
            taken += members
    return sorted(taken or min(groups, key=lambda group: len(group[1]))[1])


def _group(
    conversations: Sequence[Conversation], hashes: Mapping[ImageRef, str]
) -> list[tuple[str, list[int]]]:
    """Return the connected groups of records, each with a digest of its content and its indices."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first_keys: list[str] = []
    for conversation in conversations:
        keys = [hashes[ref] for ref in conversation.images] or [records_digest([conversation])]
        for key in keys:
            parent.setdefault(key, key)
            one, other = sorted((root(keys[0]), root(key)))
            parent[other] = one  # the smallest key names the group, whatever order the records come in
        first_keys.append(keys[0])
    members: dict[str, list[int]] = {}
    for index, key in enumerate(first_keys):
        members.setdefault(root(key), []).append(index)
    return [(hashlib.sha256(f"held out {key}".encode()).hexdigest(), group) for key, group in members.items()]
