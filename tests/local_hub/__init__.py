"""A Hub on this machine: the protocol of huggingface.co as `huggingface_hub` speaks it, for tests and rehearsals.

What lives here: a server (`server`), the repositories that it keeps in a folder (`repositories`), and faults that it
can be told to make (`faults`). What must not: anything of `pretrain`, or a library beyond Python's own.

    with LocalHub(folder) as hub:                       # on a free port of 127.0.0.1
        os.environ["HF_ENDPOINT"] = hub.url             # before huggingface_hub is imported
        os.environ["HF_TOKEN"] = WRITER                 # the token of the user `local`
        ...
        hub.requests                                    # what was asked: method, path, status, bytes received
        hub.faults.add(Fault("drop", "PUT", times=1))   # the next upload loses its connection

It speaks no xet: a client with `hf_xet` installed needs `HF_HUB_DISABLE_XET=1` unless it asks first, as
`pretrain publish` does.
"""

from tests.local_hub.faults import Fault, Faults
from tests.local_hub.repositories import Repositories
from tests.local_hub.server import READER, WRITER, LocalHub

__all__ = ["READER", "WRITER", "Fault", "Faults", "LocalHub", "Repositories"]
