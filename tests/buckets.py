"""A bucket on this machine, for tests of object storage."""

import logging
import threading

import pytest
from processes import free_port


@pytest.fixture(scope="session")
def bucket():
    """Address of an empty bucket, kept in memory by an emulator, which child processes find too."""
    server_lib = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    port = free_port()
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks Google what kind of bucket it is
        pytest.importorskip("gcsfs", reason="needs gcsfs: pip install '.[gcs]'")
        patch.setattr(threading, "excepthook", lambda _: None)  # its threads complain of clients that have gone
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        server = server_lib.create_server("localhost", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield "gs://bucket"
        server.stop()
