"""``-dry-run``: what would be done, without a bucket, a record or an object made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlstor.aisloader.lists import Listed
from mlstor.aisloader.run import essentials
from mlstor.aisloader.session import client_of, is_missing
from mlstor.errors import UsageError
from mlstor.storage.store import open_store

if TYPE_CHECKING:
    from mlstor.aisloader.translate import Plan


def show(plan: Plan) -> int:
    """Print the plan, and how many objects there are to read."""
    client = None if plan.direct_s3 else client_of(plan)
    store = open_store(plan.options.urls[0], **plan.options.store_options)
    try:
        missing = client is not None and is_missing(client)
        if plan.options.get and missing:
            raise UsageError(f"there is no bucket {plan.bucket}, so nothing to read: give -pctput=100 to make it")
        if plan.options.get and not plan["filelist"]:
            listed: Any = Listed(store, client, plan.archives, plan["cached"])
            count = sum(len(page.keys) for page in listed.list(plan["subdir"]))
            print(f"Found {count:,} {'archived files' if plan.archives else 'existing objects'}")
        if missing:
            print(f"bucket {plan.bucket} would be made")
    finally:
        store.close()
        if client is not None:
            client.close()
    print(f"as mlstor stream: {' '.join(plan.words)}")
    for note in plan.notes:
        print(f"note: {note}")
    print(f"Runtime configuration:\n{json.dumps(essentials(plan), indent=3)}")
    return 0
